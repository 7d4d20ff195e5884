"""Shares the write stages of a recipe among actors of a Ray cluster; each claims prompts of its own, as `mmkd write` does.

    python scripts/launch/write_with_ray.py RECIPE [--actors 2] [--gpus 0] [KEY=VALUE ...]

Ray only starts them: what is claimed, written and resumed lies in the run's folder, which all hosts must see. It is no part of
mmkd's requirements: `pip install ray`. Without RAY_ADDRESS the actors run on this machine.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: it would report to its makers


class Writer:
    """One writer: what `mmkd write` is in a shell."""

    def write(self, recipe: str, changes: list[str]) -> dict[str, str]:
        """{stage: folder} of what was written, and who has written: the process."""
        from mmkd.recipes.reading import load_recipe
        from mmkd.runs.writes import write_all

        return {name: str(folder) for name, folder in write_all(load_recipe(recipe, changes)).written.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    given = parser.parse_args()
    import ray

    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": given.actors, "include_dashboard": False}
    ray.init(runtime_env={"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}, **local)
    actors = [ray.remote(num_cpus=1, num_gpus=given.gpus)(Writer).remote() for _ in range(given.actors)]
    recipe = str(Path(given.recipe).resolve())
    found = ray.get([actor.write.remote(recipe, given.changes) for actor in actors])
    ray.shutdown()
    for name, folder in found[0].items():
        rows = [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        answers = (Path(folder).parent / "answers").rglob("*.jsonl")
        shares = collections.Counter({path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in answers})
        print(f"{name}: {folder}, {len(rows)} rows; answers by file: {dict(shares)}")


if __name__ == "__main__":
    main()

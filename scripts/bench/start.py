#!/usr/bin/env python3
"""Seconds from the command `mmkd distill RECIPE` to the end of its first training step, by part.

    python scripts/bench/start.py                                           # tiny towers, 200 scenes of the embedded sample
    python scripts/bench/start.py scripts/recipes/sample_labelled.yaml      # a recipe as it stands (its data must be there)
    python scripts/bench/start.py RECIPE key=value --repeats 9 --json start.json
    python scripts/bench/start.py --rows 665000 --repeats 2                 # so many conversations in LLaVA's JSON, about 850 MB

Every start is a process of its own that runs the command's code and ends after the step. Its time is the CPU's (user and
system, from the start of the interpreter: steady where other programs run) and the clock's. Beside it, in turn, what other
scripts pay: the import of torch, and that of transformers' trainer and model classes. Medians, least and most. Memory is the
greatest of the process over what it had after the imports. A first round warms the disk, and reads a large list for the first
time; its own figures are shown, too.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TINY = ROOT / "scripts" / "recipes" / "sample_labelled.yaml"
FLOORS = {
    "import torch": "import torch",
    "import of transformers' trainer and models": "from transformers import Trainer, AutoModelForImageTextToText, AutoProcessor",
}
PARTS = ("command", "imports", "recipe", "data", "towers", "guards", "trainer", "first step")


def main() -> None:
    options = parse()
    if options.child:
        start(options.child, [options.recipe, *options.overrides])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    show(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("recipe", nargs="?", help="default: sample_labelled.yaml on a sample of --scenes scenes")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--scenes", type=int, default=200, help="of each data set of the small sample")
    parser.add_argument("--rows", type=int, help="conversations of a large JSON list to train on, in place of the sample")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the result here, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [options.recipe, *options.overrides]
    if options.recipe is None:
        from mmkd.sample.sample_set import write_sample_set

        write_sample_set(folder / "sample", sizes={"train": options.scenes, "val": 20, "test": 20})
        command = [str(TINY), f"data_root={folder / 'sample'}"]
        if options.rows:
            command += large_list(folder, options.rows)
    rounds: list[dict[str, Any]] = []
    for number in range(options.repeats + 1):
        found = timed_start(command, folder / f"run_{number}")
        found["floors"] = {name: timed_floor(code) for name, code in FLOORS.items()}
        if number:
            rounds.append(found)
        else:
            first = found
    return {
        "command": command,
        "repeats": options.repeats,
        "cpu_seconds": {part: spread([r["cpu"][part] for r in rounds]) for part in [*PARTS, "all"]},
        "clock_seconds": spread([r["clock"] for r in rounds]),
        "first_round": {"cpu_seconds": first["cpu"]["all"], "memory_mib": first["memory"]},
        "memory_mib": spread([r["memory"] for r in rounds]),
        "floors_cpu_seconds": {name: spread([r["floors"][name] for r in rounds]) for name in FLOORS},
    }


def large_list(folder: Path, rows: int) -> list[str]:
    """Writes conversations as long as those of LLaVA's mixture, with pictures of the sample; the overrides that train on them."""
    images = folder / "large" / "images"
    images.mkdir(parents=True)
    for path in (folder / "sample").rglob("*.png"):
        shutil.copy(path, images)
    pictures = sorted(path.name for path in images.iterdir())
    words = "what stands here beside the old red house and how far is it from the road".split()
    with (folder / "large" / "train.json").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            turns = []
            for turn in range(6):
                text = " ".join(words[(number + turn + place) % len(words)] for place in range(32))
                turns.append({"from": "gpt" if turn % 2 else "human", "value": ("" if turn else "<image>\n") + text})
            row = {"id": f"{number:09}", "image": pictures[number % len(pictures)], "conversations": turns}
            stream.write(("[" if not number else ",\n") + json.dumps(row))
        stream.write("]")
    data = f"{{format: llava, root: {folder / 'large'}, files: {{annotations: train.json, images: images}}}}"
    return [f"stages.answer.data=[{data}]", "control=false", "max_length=2048", "guards.teacher_is_better=false",
        "evaluation.benchmarks=[]", "stages.answer.optimiser.batch_size=8", f"data_root={folder / 'sample'}"]  # fmt: skip


def spread(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [round(x, 3) for x in (statistics.median(values), min(values), max(values))]


def timed_start(command: list[str], folder: Path) -> dict[str, Any]:
    begun = time.time()
    arguments = [*command, f"output={folder / 'run'}"]
    run([sys.executable, __file__, "--child", str(folder), *arguments])
    found = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    return {"cpu": found["cpu"], "clock": found["ended"] - begun, "memory": found["memory"]}


def timed_floor(code: str) -> float:
    return float(run([sys.executable, "-c", f"{code}; import time; print(time.process_time())"]).splitlines()[-1])


def run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def show(result: dict[str, Any]) -> None:
    print(f"mmkd distill {' '.join(result['command'])}: {result['repeats']} starts, median (least - most)\n")
    rows = {**result["cpu_seconds"], **{f"floor: {name}": found for name, found in result["floors_cpu_seconds"].items()}}
    print("| | CPU seconds |\n|---|---|")
    for name, (middle, least, most) in rows.items():
        print(f"| {name} | {middle:.2f} ({least:.2f} - {most:.2f}) |")
    middle, least, most = result["clock_seconds"]
    print(f"| all, by the clock | {middle:.2f} ({least:.2f} - {most:.2f}) |")
    middle, least, most = result["memory_mib"]
    print(f"\nmemory over the imports: {middle:.0f} MiB ({least:.0f} - {most:.0f})")
    first = result["first_round"]
    print(f"first round: {first['cpu_seconds']:.2f} CPU seconds, {first['memory_mib']:.0f} MiB")


# ---- in the process that is measured ---------------------------------------------------------------------------------


class Marks:
    """The CPU's time by part: from the mark before to this one."""

    def __init__(self, folder: str):
        self.folder, self.taken, self.last = Path(folder), dict.fromkeys(PARTS, 0.0), 0.0
        self.idle = 0.0  # MiB, after the imports

    def __call__(self, part: str) -> None:
        now = time.process_time()
        self.taken[part] += now - self.last
        self.last = now

    def end(self) -> None:
        """Writes the times and ends the process, as training would go on otherwise."""
        self("first step")
        memory = greatest_memory() - self.idle
        found = {"cpu": self.taken | {"all": self.last}, "ended": time.time(), "memory": memory}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "start.json").write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)


def greatest_memory() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class MarkedImport:
    """Finds one module as usual, and marks its functions once it is imported."""

    def __init__(self, name: str, before: Callable[[], None], after: Callable[[Any], None]):
        self.name, self.before, self.after = name, before, after

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.name else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                self.before()
                execute(module)
                self.after(module)

            spec.loader.exec_module = exec_module
        return spec


def start(folder: str, arguments: list[str]) -> None:
    """Runs `mmkd distill` up to the end of the first step."""
    from mmkd.cli import main as command

    marks = Marks(folder)
    sys.meta_path.insert(0, MarkedImport("mmkd.recipes.recipe", lambda: marks("command"), lambda recipe: marks("imports")))
    mark_scans(marks)
    sys.meta_path.insert(0, MarkedImport("mmkd.runs.run", lambda: marks("recipe"), lambda run: mark_functions(run, marks)))
    sys.exit(command(["distill", *arguments]))


def mark_scans(marks: Marks) -> None:
    """What a registry imports while the recipe is checked is the time of imports, not of the recipe."""
    from mmkd.registry import Registry

    scan, running = Registry._scan, []

    def marked_scan(registry: Registry) -> None:
        outermost = not running and not registry._scanned
        if outermost:
            marks("recipe")
        running.append(registry)
        try:
            scan(registry)
        finally:
            running.pop()
        if outermost:
            marks("imports")

    Registry._scan = marked_scan


def mark_functions(run: Any, marks: Marks) -> None:
    from transformers import TrainerCallback

    from mmkd.runs import stages

    marks("imports")
    marks.idle = greatest_memory()
    run.all_samples = marked(run.all_samples, marks, "data")
    run.preflight = marked(run.preflight, marks, "guards", before="towers")
    stages.freeze_unreached = marked(stages.freeze_unreached, marks, "guards", before="towers")
    stages.run_guards = marked(stages.run_guards, marks, "guards")

    class Stop(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            marks("trainer")

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            marks.end()

    train = stages.DistillTrainer.train

    @wraps(train)
    def watched(trainer: Any, *arguments: Any, **more: Any) -> Any:
        trainer.add_callback(Stop())
        return train(trainer, *arguments, **more)

    stages.DistillTrainer.train = watched


def marked(function: Callable, marks: Marks, part: str, before: str | None = None) -> Callable:
    @wraps(function)
    def inner(*arguments: Any, **more: Any) -> Any:
        if before is not None:
            marks(before)
        result = function(*arguments, **more)
        marks(part)
        return result

    return inner


if __name__ == "__main__":
    main()

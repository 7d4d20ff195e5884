#!/usr/bin/env python3
"""`mmkd estimate` against what it foretells: seconds of a step and most bytes at once, on small recipes.

    python scripts/bench/estimate.py                       # all; --recipes quickstart kept llava_kd switch_kd qwen2_5_vl
    python scripts/bench/estimate.py --scenes 100

A recipe's stage is estimated and then trained for three epochs, both in one process and by its CPU time (steady where other
programs run; one thread). The first epoch prepares the samples; bytes are the most that the allocator had given out at once in
the second, beyond weights and optimiser; seconds are the mean step of the third.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
TERMS = "stages.answer.terms="
RECIPES = {
    "live": [f"{TERMS}{{cross_entropy: 1, kl: {{kind: forward_kl, weight: 4}}}}"],
    "features": [f"{TERMS}{{cross_entropy: 1, seen: {{kind: forward_kl, positions: visual}}, eyes: {{kind: feature_match}}}}"],
    "kept": ["teacher.keep=true"],
    "quickstart": ["teacher.keep=true", f"{TERMS}{{cross_entropy: 1, kl: {{kind: forward_kl, weight: 4}}}}"],
    "pieces": ["stages.answer.optimiser.micro_batch_size=8"],
    "fixed": [], "tokens": [], "llava_kd": [], "switch_kd": [], "qwen2_5_vl": [],
}  # fmt: skip
LENGTHS = {"fixed": "4 samples", "tokens": "24,000 tokens"}  # variants of run.py's preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--json", help="write the result here, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compared(options.child)))
        return
    import run
    import shapes

    every: dict[str, dict[str, list[float]]] = {}
    print("| recipe | ms a step, estimate | measured | ratio | MiB, estimate | measured | ratio |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.recipes:
            given = Path(folder) / name
            given.mkdir()
            if name in LENGTHS:
                recipe, overrides, variants = run.tokens(given)
                arguments = [recipe, *overrides, *variants[LENGTHS[name]]]
            elif name in shapes.TERMS:
                arguments = [shapes.shaped(given, name)[0]]
            else:
                options.recipe, options.overrides, options.variants, options.steps = run.RECIPE, RECIPES[name], [], 1
                arguments = [run.RECIPE, *run.sample(given, options)[1]]
            found = every[name] = child([*arguments, f"output={given / 'run'}"])
            (a, b), (c, d) = [1000 * s for s in found["seconds"]], [n / 2**20 for n in found["bytes"]]
            print(f"| {name} | {a:.0f} | {b:.0f} | {a / b:.2f} | {c:.1f} | {d:.1f} | {c / d:.2f} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def child(arguments: list[str]) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compared(arguments: list[str]) -> dict[str, list[float]]:
    """[estimate, measured] of seconds a step and of bytes."""
    time.perf_counter = time.process_time
    import numpy as np
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from mmkd.recipes.reading import load_recipe
    from mmkd.runs import stages
    from mmkd.runs.data import all_samples, texts_of
    from mmkd.runs.estimate import stage_estimate
    from mmkd.runs.kept import keeps, with_kept_teacher
    from mmkd.runs.towers import build_student, load_teachers

    recipe = load_recipe(arguments[0], arguments[1:])
    samples, teachers = all_samples(recipe), load_teachers(recipe)
    (name, spec), *_ = recipe.stages.items()
    foretold, _ = stage_estimate(recipe, name, spec, samples[name], build_student(recipe, teachers, texts_of(samples)), teachers)
    batch = spec.optimiser.batch_size
    epoch = len(samples[name]) // batch
    recipe = recipe.model_copy(update={"stages": {name: spec.model_copy(update={"steps": 3 * epoch, "epochs": None})}})
    if keeps(recipe):
        recipe = with_kept_teacher(recipe, teachers)
        teachers = load_teachers(recipe)
    marks, original = [], stages.DistillTrainer.train
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *given: Any, **named: Any) -> None:
            if state.global_step == epoch:
                recorded.__enter__()
            if state.global_step == 2 * epoch:
                recorded.__exit__(None, None, None)
            if state.global_step >= 2 * epoch:
                marks.append(time.process_time())

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        self.add_callback(Steps())
        return original(self, *given, **named)

    stages.DistillTrainer.train = watched
    student = build_student(recipe, teachers, texts_of(samples))
    stages.train(recipe, "student", student, teachers, Path(recipe.output))
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = np.array([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    memory = foretold.memory
    step = sum(memory[part] for part in ("gradients", "activations", "losses"))
    return {"seconds": [foretold.seconds, (marks[-1] - marks[0]) / (len(marks) - 1)], "bytes": [step, int(sizes.cumsum().max())]}


if __name__ == "__main__":
    main()

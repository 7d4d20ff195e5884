#!/usr/bin/env python3
"""What a step of a whole recipe takes in the real training loop, by part: control, live teacher, kept signals.

    python scripts/bench/run.py                                        # the embedded sample's recipe on 200 scenes
    python scripts/bench/run.py scripts/recipes/sample_labelled.yaml key=value --variants control kept --rounds 5
    python scripts/bench/run.py --roots /path/to/an/older/checkout .   # old and new side by side, in turn
    python scripts/bench/run.py --preset tokens                        # fixed micro-batches against `micro_batch_tokens`

Every variant is a process of its own that trains the recipe's stages as `mmkd distill` does. All take turns step by step, on the
same samples: only one works while the others wait, so that a slow moment of the machine meets them alike. Milliseconds are the
process's CPU time without data workers; a part's share is what was spent in it and in nothing that is a part itself. The first
epoch prepares the samples and is told apart; the others are the steps of a long run. A ratio is the median over pairs of one step
in two variants. Medians over steps, then over rounds (least and most). The control's step is the floor. Memory is the greatest
of the process over what it had before the first step.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "scripts/recipes/sample_labelled.yaml"
PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser", "loop")
QUIET = ["guards.teacher_is_better=false", "guards.pixels_matter=false", "evaluation.benchmarks=[]", "control=false"]
VARIANTS = {"control": ["control"], "live": [], "kept": ["teacher.keep=true"]}


def main() -> None:
    options = parse()
    if options.child:
        train(options.child, [options.recipe, *options.overrides])
        return
    with tempfile.TemporaryDirectory() as folder:
        recipe, overrides, variants = tokens(Path(folder)) if options.preset == "tokens" else sample(Path(folder), options)
        rounds = []
        for n in range(options.rounds):
            racers = {
                name: Racer(root, Path(folder) / f"{n}_{i}_{name}", [recipe, *overrides, *given])
                for i, root in enumerate(options.roots) for name, given in named(variants, options.roots, root)
            }  # fmt: skip
            rounds.append(raced(racers))
    show(rounds, options)
    if options.json:
        Path(options.json).write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--preset", choices=("sample", "tokens"), default="sample")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--roots", nargs="+", default=[str(ROOT)], help="checkouts whose code is raced")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the result here, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def named(variants: dict[str, list[str]], roots: list[str], root: str) -> list[tuple[str, list[str]]]:
    """The variants of a checkout; their names tell it where there are several."""
    where = "" if len(roots) == 1 else f", {Path(root).resolve().name}"
    return [(name + where, given) for name, given in variants.items()]


# ---- what is raced ---------------------------------------------------------------------------------------------------


def sample(folder: Path, options: argparse.Namespace) -> tuple[str, list[str], dict[str, list[str]]]:
    """A recipe on the embedded sample: two and more epochs of its first stage."""
    sys.path.insert(0, str(ROOT))
    from mmkd.sample.sample_set import write_sample_set

    write_sample_set(folder / "sample", sizes={"train": options.scenes, "val": 2, "test": 2})
    overrides = [f"data_root={folder / 'sample'}", f"stages.answer.steps={options.steps}", *options.overrides]
    return options.recipe, [*QUIET, *overrides], {name: VARIANTS[name] for name in options.variants}


WORDS = "what stands here beside the old red house and how far is it from the road".split()
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4}
VISION = {"model_type": "vit", **SIZES, "hidden_size": 96, "intermediate_size": 192, "image_size": 64, "patch_size": 8}


def tokens(folder: Path, count: int = 48, least: int = 20, most: int = 3000) -> tuple[str, list[str], dict[str, list[str]]]:
    """Questions of `least` to `most` tokens, evenly in their logarithm, half of them with a picture of 64 visual tokens."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from PIL import Image

    from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer

    (folder / "data").mkdir()
    draw, rows, tokenizer = random.Random(0), [], train_tokenizer([" ".join(WORDS)] * 20, 400)
    for number in range(count):
        length, pictured = round(least * (most / least) ** draw.random()), number % 2 == 0
        if pictured:
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / f"{number}.png")
        words = [draw.choice(WORDS) for _ in range(max(1, length - 12 - 64 * pictured))]
        rows.append({"id": str(number), "question": " ".join(words), "answer": "far from the road"}
                    | ({"image": f"{number}.png"} if pictured else {}))  # fmt: skip
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for role, width in (("teacher", 192), ("student", 96)):
        language = {"model_type": "llama", **SIZES, "hidden_size": width, "intermediate_size": 2 * width,
                    "max_position_embeddings": 4096}  # fmt: skip
        eyes = VisionSpec(config=VISION, image_size=(64, 64))
        assemble(eyes, LanguageSpec(config=language), tokenizer=tokenizer, seed=1).save(folder / role)
    stage = {
        "data": [{"format": "jsonl", "root": str(folder / "data"), "prompt": "plain"}], "epochs": 1, "log_every": 1,
        "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}, "optimiser": {"batch_size": 24, "learning_rate": 1e-4},
    }  # fmt: skip
    content = {"title": "lengths", "output": "OUTPUT", "max_length": 4096, "teacher": {"model": str(folder / "teacher")},
               "student": {"model": str(folder / "student")}, "stages": {"answer": stage}}  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(content))
    key = "stages.answer.optimiser"
    variants = {
        "4 samples": [f"{key}.micro_batch_size=4"],
        "4 samples, by length": [f"{key}.micro_batch_size=4", "stages.answer.sampler=length"],
        f"{8 * most:,} tokens": [f"{key}.micro_batch_tokens={8 * most}"],
    }
    return str(folder / "recipe.yaml"), QUIET, variants


# ---- one process -----------------------------------------------------------------------------------------------------


READY = "@step"  # a racer's line when it has ended a step; it goes on when it is given one


class Racer:
    """One variant in a process of its own, with the code of a checkout."""

    def __init__(self, root: str, folder: Path, arguments: list[str]):
        folder.mkdir(parents=True)
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        environment = os.environ | {"PYTHONPATH": str(Path(root).resolve()), "OMP_NUM_THREADS": threads}
        self.folder = folder
        self.command = [sys.executable, __file__, "--child", str(folder), *arguments, f"output={folder / 'run'}"]
        self.said: list[str] = []
        self.errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            self.command, text=True, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def step(self) -> bool:
        """Waits for the end of a step; False where the run has ended. Raises SystemExit where it failed."""
        for line in self.process.stdout:
            if line.rstrip().endswith(READY):
                return True
            self.said.append(line)
        if self.process.wait():
            self.errors.seek(0)
            sys.exit(f"{' '.join(self.command)} failed:\n{''.join(self.said)[-2000:]}{self.errors.read()[-4000:]}")
        return False

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "steps.json").read_text(encoding="utf-8"))


def raced(racers: dict[str, Racer]) -> dict[str, Any]:
    """All variants step by step in turn; none begins before all have come to their first step. What each has measured."""
    try:
        running = [racer for racer in racers.values() if racer.step()]
        while running:
            for racer in list(running):
                racer.go()
                if not racer.step():
                    running.remove(racer)
    finally:
        for racer in racers.values():
            racer.process.kill()  # one that has ended takes no harm
    return {name: racer.result() for name, racer in racers.items()}


class Clock:
    """CPU time by part; a part within another is not counted in the outer one."""

    def __init__(self) -> None:
        self.taken, self.stack, self.last = dict.fromkeys(PARTS, 0.0), ["loop"], time.process_time()
        self.rows: list[dict[str, float]] = []
        self.samples: list[str] = []
        self.idle = 0.0

    def switch(self) -> None:
        now = time.process_time()
        self.taken[self.stack[-1]] += now - self.last
        self.last = now

    def around(self, function: Callable, part: str) -> Callable:
        """The function, whose time is the part's; what a teacher runs is the teacher's."""

        @wraps(function)
        def inner(*given: Any, **named: Any) -> Any:
            self.switch()
            self.stack.append("teacher" if self.stack[-1] == "teacher" else part)
            try:
                return function(*given, **named)
            finally:
                self.switch()
                self.stack.pop()

        return inner

    def noting_samples(self, forward: Callable) -> Callable:
        """The distiller's pass, noting which samples it is over."""

        def inner(distiller: Any, batch: Any, *given: Any, **named: Any) -> Any:
            self.samples += batch.student.ids
            return forward(distiller, batch, *given, **named)

        return inner

    def step(self) -> None:
        """A step has ended."""
        self.switch()
        self.rows.append(dict(self.taken))
        self.taken = dict.fromkeys(PARTS, 0.0)


def mark(clock: Clock) -> None:
    """Puts the clock around what is a part of a step; a checkout that lacks one of these has its time in the part around it."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from mmkd.teachers import live, stored
    from mmkd.towers.tower import Tower
    from mmkd.train import distiller, signals, trainer

    places = [
        (trainer.DistillTrainer, ("get_batch_samples",), "data"),
        (signals.BatchSignals, ("_teacher_rows", "said", "teacher_gram"), "teacher"),
        (live.LiveSignals, ("rows", "visual_rows", "features", "hidden"), "teacher"),
        (stored.StoredSignals, ("rows", "visual_rows", "features"), "teacher"),
        (Tower, ("see", "read"), "student"),
        (distiller.Distiller, ("forward",), "loss"),
        (Accelerator, ("backward",), "backward"),
        (trainer.DistillTrainer, ("_clip_grad_norm", "_get_grad_norm"), "optimiser"),
        (AcceleratedOptimizer, ("step", "zero_grad"), "optimiser"),
    ]
    for kind, names, part in places:
        for name in names:
            if hasattr(kind, name):
                setattr(kind, name, clock.around(getattr(kind, name), part))
    distiller.Distiller.forward = clock.noting_samples(distiller.Distiller.forward)


def train(folder: str, arguments: list[str]) -> None:
    """Trains a recipe's stages, as a run does, with the clock on."""
    is_control = "control" in arguments
    path, *overrides = [given for given in arguments if given != "control"]
    from mmkd.recipes.reading import load_recipe

    recipe = load_recipe(path, overrides)
    from transformers import TrainerCallback

    from mmkd.runs import stages
    from mmkd.runs.control import control_recipe
    from mmkd.runs.data import all_samples, texts_of
    from mmkd.runs.towers import build_student, load_teachers

    teachers = load_teachers(recipe)
    student = build_student(recipe, teachers, texts_of(all_samples(recipe)))
    begun = time.process_time()
    if is_control:
        recipe, teachers = control_recipe(recipe), {}
    elif "teacher.keep=true" in overrides:
        from mmkd.runs.kept import with_kept_teacher

        recipe = with_kept_teacher(recipe, teachers)
        teachers = load_teachers(recipe)
    kept, clock, original = time.process_time() - begun, Clock(), stages.DistillTrainer.train
    mark(clock)

    class Steps(TrainerCallback):
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            clock.idle = greatest_memory()
            wait_for_turn()
            clock.step()
            clock.rows.clear()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            clock.step()
            wait_for_turn()

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        self.add_callback(Steps())
        found = original(self, *given, **named)
        self.epoch_steps = len(self.train_dataset) // self.stage.optimiser.batch_size
        write(self, clock, kept, Path(folder))
        return found

    stages.DistillTrainer.train = watched
    stages.train(recipe, "student", student, teachers, Path(recipe.output))


def wait_for_turn() -> None:
    print(READY, flush=True)
    sys.stdin.readline()


def write(trainer: Any, clock: Clock, kept: float, folder: Path) -> None:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = {
        "batch": trainer.stage.optimiser.batch_size, "epoch_steps": trainer.epoch_steps, "steps": clock.rows,
        "kept_seconds": kept, "memory": greatest_memory() - clock.idle, "losses": losses, "samples": clock.samples,
    }  # fmt: skip
    (folder / "steps.json").write_text(json.dumps(found), encoding="utf-8")


def greatest_memory() -> float:
    """Of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- the table -------------------------------------------------------------------------------------------------------


def middle(found: dict[str, Any], first: bool) -> dict[str, float]:
    """Mean milliseconds by part and of all over the first epoch's steps, or medians over the others'."""
    border = found["epoch_steps"]
    rows = found["steps"][:border] if first else found["steps"][border:]
    rows = rows or found["steps"]
    pick = statistics.mean if first else statistics.median
    found = {part: 1000 * pick(row[part] for row in rows) for part in PARTS}
    return found | {"all": 1000 * pick(sum(row.values()) for row in rows)}


def ratio(mine: dict[str, Any], other: dict[str, Any], whole: bool) -> float:
    """Of the times of two variants: of their means, or the median over pairs of the same step, which needs the same samples."""
    if whole:
        return middle(mine, True)["all"] / middle(other, True)["all"]
    if mine["samples"] != other["samples"]:
        sys.exit("two variants did not take the same samples in the same steps, so that their steps are no pairs")
    pairs = list(zip(mine["steps"], other["steps"], strict=True))
    return statistics.median(sum(a.values()) / sum(b.values()) for a, b in pairs[mine["epoch_steps"] :] or pairs)


def show(rounds: list[dict[str, Any]], options: argparse.Namespace) -> None:
    names = list(rounds[0])
    whole = options.preset == "tokens"  # its steps differ, so the mean over an epoch is what counts
    print(f"| variant | ms a step | / {names[0]} | samples a CPU second | {' | '.join(PARTS)} | first epoch | memory MiB |")
    print("|---" * (len(PARTS) + 6) + "|")
    for name in names:
        steps = [middle(found[name], whole) for found in rounds]
        first = [middle(found[name], True)["all"] for found in rounds]
        ratios = [ratio(found[name], found[names[0]], whole) for found in rounds]
        times = [step["all"] for step in steps]
        time_ = statistics.median(times)
        shares = " | ".join(f"{100 * statistics.median(step[part] / step['all'] for step in steps):.0f} %" for part in PARTS)
        memory = statistics.median(found[name]["memory"] for found in rounds)
        speed = 1000 * rounds[0][name]["batch"] / time_
        print(
            f"| {name} | {time_:.0f} ({min(times):.0f} - {max(times):.0f}) | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}) | {speed:.0f} | {shares} | {statistics.median(first):.0f} | {memory:.0f} |"
        )
    for name in names:
        losses = ", ".join(f"{loss:.5f}" for loss in rounds[0][name]["losses"][:4])
        kept = rounds[0][name]["kept_seconds"]
        print(f"\n{name}: losses {losses}" + (f"; {kept:.1f} s to keep" if kept > 1 else ""))


if __name__ == "__main__":
    main()

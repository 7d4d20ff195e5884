#!/usr/bin/env python3
"""Race a whole distillation step against TRL's GOLD trainer (on-policy share 0: both read given answers), same towers and batch.

    python scripts/bench/gold.py --preset scaled --threads 1 --clock cpu
    python scripts/bench/gold.py --preset large --dtype bfloat16 --json gold.json       on a GPU

Both compute the mean forward KL at the answers' tokens, forward and backward, all of the student trained. They take turns in one
process; medians over rounds. `peak` is what the process (on a GPU, the allocator) takes at most above its size before the first
step, in a process of its own for each: towers not included, gradients included. Needs `trl`, which mmkd does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import step as bench
import torch
from loss import Peak

from mmkd.towers.tower import Tower
from mmkd.train.distiller import Distiller

METHODS = ("mmkd", "gold")
# The trainer tokenizes its data when it is made; the race gives it the batch itself.
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def main() -> None:
    options = parse()
    if not find_spec("trl"):
        sys.exit("gold.py: the package trl is not installed here; install it (pip install trl) to race its GOLD trainer")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.worker:
        print(json.dumps(peak_of(options, device)))
        return
    steps = steps_of(options, device, METHODS)
    losses = {name: run() for name, run in steps.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, run in steps.items():
            seconds[name].append(bench.timed(run, device, options.clock))
    found = {
        name: {
            "seconds": statistics.median(times), "range": [min(times), max(times)], "loss": losses[name],
            "peak_mib": worker(options, name),
        }
        for name, times in seconds.items()
    }  # fmt: skip
    show(options, found)
    if options.json:
        settings = {"preset": options.preset, **bench.PRESETS[options.preset], "dtype": options.dtype, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def steps_of(options: argparse.Namespace, device: torch.device, methods: tuple[str, ...]) -> dict[str, Callable[[], float]]:
    """One distillation step of each method, which returns the loss."""
    sizes = bench.PRESETS[options.preset]
    teacher, student = (bench.tower(sizes, role, device, options.dtype) for role in ("teacher", "student"))
    teacher.freeze()
    batch, _ = bench.batch_of(sizes, student, teacher, ["response"])
    batch = batch.to(device)
    distiller = Distiller(student, teacher, [bench.term("forward_kl", "response")])

    def ours() -> float:
        return finished(student, distiller.train()(batch)[0])

    made = {"mmkd": ours}
    if "gold" in methods:
        trainer, read = gold_of(student, teacher), batch.student
        labels = torch.where(read.answer, read.input_ids, -100)
        inputs = {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "labels": labels, **read.pixels}
        made["gold"] = lambda: finished(student, trainer.compute_loss(student.model, inputs))
    return {name: made[name] for name in methods}


def finished(student: Tower, loss: torch.Tensor) -> float:
    loss.backward()
    student.model.zero_grad(set_to_none=True)
    return float(loss.detach())


def gold_of(student: Tower, teacher: Tower):
    """TRL's trainer; forward KL is its beta 0."""
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    student.processor.tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    config = GOLDConfig(
        output_dir=tempfile.mkdtemp(), lmbda=0.0, beta=0.0, temperature=1.0, report_to=[], bf16=False, max_length=4096,
        use_cpu=student.device.type == "cpu", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GOLDTrainer(
        model=student.model, teacher_model=teacher.model, args=config, train_dataset=Dataset.from_list([{"messages": turns}] * 8),
        processing_class=student.processor.tokenizer,
    )  # fmt: skip
    student.model.train()
    return trainer


# ---- memory ----------------------------------------------------------------------------------------------------------


def worker(options: argparse.Namespace, method: str) -> float:
    command = [
        sys.executable, __file__, "--worker", method, "--preset", options.preset, "--dtype", options.dtype,
        "--threads", str(options.threads), *(["--device", options.device] if options.device else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of(options: argparse.Namespace, device: torch.device) -> float:
    """MiB above the size before the first step."""
    run = steps_of(options, device, (options.worker,))[options.worker]
    with Peak(device) as peak:
        run()
    return peak.mib


def show(options: argparse.Namespace, found: dict[str, dict]) -> None:
    about = f"preset {options.preset}, {options.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{about}, clock {options.clock}")
    for name, row in found.items():
        low, high = (1000 * x for x in row["range"])
        taken = f"{1000 * row['seconds']:>9.0f} ms ({low:.0f} - {high:.0f})"
        print(f"{name:<6}{taken}{row['peak_mib']:>9.0f} MiB   loss {row['loss']:.6f}")
    ours, theirs = found["mmkd"], found["gold"]
    print(f"mmkd / gold: time {ours['seconds'] / theirs['seconds']:.2f}, memory {ours['peak_mib'] / theirs['peak_mib']:.2f}")


if __name__ == "__main__":
    main()

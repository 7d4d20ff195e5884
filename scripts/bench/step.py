#!/usr/bin/env python3
"""Race a whole distillation step against the sum of its unavoidable parts, and a step from the cache against fine-tuning.

    python scripts/bench/step.py --preset scaled --threads 1 --clock cpu
    python scripts/bench/step.py --preset large --dtype bfloat16 --json step.json       on a GPU: 7B- and 0.5B-shaped towers

Random towers, one batch. `teacher` is the teacher's pass and its head on the compared rows; `student` the student's forward
and backward pass with cross-entropy on the same rows; `whole` the step with the terms of the case. `cached` is the same step
with the teacher's rows read from a cache on disk, `sft` the student's step with cross-entropy on the answers alone, as mmkd does
it, `plain` as transformers does it (logits of all positions). `floor` is what a step from the cache cannot go below: `student`,
which puts the compared rows through the student's head forward and backward, and the same rows through the teacher's head. All
take turns, round by round; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from mmkd.data.samples import ImageRef, Sample, Turn  # noqa: E402
from mmkd.engine.positions import gathered  # noqa: E402
from mmkd.registry import registry  # noqa: E402
from mmkd.runs.write_cache import Plan, stored_of  # noqa: E402
from mmkd.teachers.ahead import Ahead  # noqa: E402
from mmkd.teachers.store import About, ShardWriter, StoredRows, TeacherCache  # noqa: E402
from mmkd.teachers.stored import StoredSignals  # noqa: E402
from mmkd.terms.term import Place, Term  # noqa: E402
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer  # noqa: E402
from mmkd.towers.tower import Tower  # noqa: E402
from mmkd.train.batch import Batch, Pair, TeacherBatch, TeacherPart  # noqa: E402
from mmkd.train.collate import Collator  # noqa: E402
from mmkd.train.distiller import Distiller  # noqa: E402

# (width, layers) of the language models; pictures of image x image pixels in patches; answers of so many words.
# "scaled" has the proportions of "large" in what a CPU can do: the heads' share of a pass, and of the positions that are answers.
# "small" has not: its student's head costs four times its layers.
PRESETS = {
    "tiny": dict(teacher=(64, 2), student=(32, 2), vocabulary=1000, image=32, patch=8, batch=4, answer=4),
    "small": dict(teacher=(384, 6), student=(192, 3), vocabulary=32000, image=112, patch=14, batch=4, answer=16),
    "scaled": dict(teacher=(384, 6), student=(192, 3), vocabulary=2000, image=224, patch=14, batch=4, answer=16),
    "large": dict(teacher=(3584, 28), student=(896, 24), vocabulary=151936, image=336, patch=14, batch=8, answer=64),
}
CASES = {
    "kl": [("cross_entropy", "response"), ("forward_kl", "response")],
    "mdist+rdist": [("cross_entropy", "response"), ("forward_kl", "response"), ("forward_kl", "visual"), ("relation", "visual")],
    "dbild": [("cross_entropy", "response"), ("dbild", "response")],
}
HEAD_ROWS = 64  # rows of logits at a time where the teacher runs alone


class WideTower(Tower):
    """A tower whose tokenizer is small and whose vocabulary is taken to be all of its head."""

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = PRESETS[options.preset]
    teacher, student = (tower(sizes, role, device, options.dtype) for role in ("teacher", "student"))
    teacher.freeze()
    table = []
    for name in options.cases:
        table.append(race(name, options, sizes, student, teacher, device))
        print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    about = {
        "preset": options.preset, **sizes, "dtype": options.dtype, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "clock": options.clock,
        "rounds": options.rounds,
    }
    show(about, table)
    if options.json:
        Path(options.json).write_text(json.dumps({"settings": about, "results": table}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    return parser.parse_args()


def parser_of(description: str) -> argparse.ArgumentParser:
    """What races of whole steps are asked alike."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="scaled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: own time, on a busy machine")
    parser.add_argument("--json", help="write settings and results here")
    return parser


def tower(sizes: dict, role: str, device: torch.device, dtype: str) -> Tower:
    width, layers = sizes[role]
    heads = max(2, width // 64)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": width // 2, "intermediate_size": width * 2,
        "num_hidden_layers": layers // 2, "num_attention_heads": heads // 2,
        "image_size": sizes["image"], "patch_size": sizes["patch"],
    }
    language = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": 4096,
    }
    made = assemble(
        VisionSpec(config=vision, image_size=(sizes["image"], sizes["image"])),
        LanguageSpec(config=language),
        tokenizer=train_tokenizer(["red green blue"], 300),
        seed=len(role),
        dtype=getattr(torch, dtype),
    )
    made.model.to(device)
    made.__class__ = WideTower
    return made


def term(kind: str, positions: str) -> Term:
    """A term of weight 1; unlike a recipe's it may be a cross-entropy at visual positions, where the target means nothing."""
    return registry("terms").get(kind)(place=Place(f"{kind}_{positions}", kind, positions=positions))


def race(name: str, options: argparse.Namespace, sizes: dict, student: Tower, teacher: Tower, device: torch.device) -> dict:
    terms = [term(kind, positions) for kind, positions in CASES[name]]
    positions = sorted({t.positions for t in terms})
    loaded, stored = batch_of(sizes, student, teacher, positions)
    if device.type == "cuda":
        loaded = loaded.pin_memory()
    batch = loaded.to(device)
    where = torch.stack([getattr(batch.on_host.teacher, p) for p in positions]).any(0)
    answers = [t for t in terms if t.kind == "cross_entropy"]
    same_rows = [term("cross_entropy", p) for p in positions]
    whole, alone, sft = Distiller(student, teacher, terms), Distiller(student, None, same_rows), Distiller(student, None, answers)
    for model in (whole, alone, sft):
        model.train()
    ahead = Ahead(whole.prefetch, device, half=None)
    with torch.inference_mode():
        kept = gathered(teacher.read(batch.teacher, teacher.see(batch.teacher)), where)  # the rows that a cache keeps
    with tempfile.TemporaryDirectory() as folder:
        cache = write(Path(folder), stored)
        runs: dict[str, Callable[[], None]] = {
            "teacher": lambda: teacher_alone(teacher, batch, where),
            "student": lambda: step(alone, batch),
            "head": lambda: head_alone(teacher, kept),
            "whole": lambda: step(whole, batch),
            "ahead": lambda: step(whole, ahead.take(loaded, loaded)),
            "cached": lambda: step(whole, from_cache(batch, read(cache, len(stored), positions).to(device))),
            "sft": lambda: step(sft, batch),
            "plain": lambda: plain(student, batch),
        }
        seconds = {run: [] for run in runs}
        for number in range(options.rounds + 1):
            for run, call in runs.items():
                taken = timed(call, device, options.clock)
                if number:  # the first round warms up
                    seconds[run].append(taken)
    found = {run: statistics.median(times) for run, times in seconds.items()}
    floor = found["student"] + found["head"]
    return {
        "case": name,
        "rows": int(where.sum()),
        "seconds": found,
        "range": {run: [min(times), max(times)] for run, times in seconds.items()},
        "whole / parts": found["whole"] / (found["teacher"] + found["student"]),
        "ahead / parts": found["ahead"] / (found["teacher"] + found["student"]),
        "cached / floor": found["cached"] / floor,
        "floor / sft": floor / found["sft"],
        "cached / sft": found["cached"] / found["sft"],
        "cached / plain": found["cached"] / found["plain"],
    }


def batch_of(sizes: dict, student: Tower, teacher: Tower, positions: list[str]) -> tuple[Batch, list[StoredRows]]:
    generator = torch.Generator().manual_seed(0)
    pairs, stored = [], []
    plan = Plan([], positions, False, "float32", None)
    for number in range(sizes["batch"]):
        pixels = torch.randint(0, 256, (sizes["image"], sizes["image"], 3), generator=generator, dtype=torch.uint8)
        pictures = [Image.fromarray(pixels.numpy())]
        turns = (Turn("user", "red green blue", 1), Turn("assistant", " ".join(["red"] * sizes["answer"])))
        sample = Sample(str(number), (ImageRef(Path(), "none"),), turns)
        own, other = (tower.encode(sample, pictures=pictures) for tower in (student, teacher))
        pairs.append(Pair(own, {"teacher": TeacherPart(other)}))
        stored += stored_of(plan, teacher, [other])
    return Collator(student, teacher)(pairs)["batch"], stored


def write(folder: Path, stored: list[StoredRows]) -> TeacherCache:
    nobody = {"model": "", "files": {}, "fingerprint": "", "dtype": "", "quantise": None, "max_length": 0, "precision": ""}
    About(**nobody, top_k=None, rows=[], features=False, logit_rule=[1.0, None], vocabulary=0, body={}).save(folder)
    writer = ShardWriter(folder)
    for number, one in enumerate(stored):
        writer.add(number.to_bytes(16, "big"), number.to_bytes(16, "big"), one)
    writer.close()
    return TeacherCache(folder)


def read(cache: TeacherCache, count: int, positions: list[str]) -> StoredRows:
    return StoredRows.join([cache.entry(number.to_bytes(16, "big"), positions) for number in range(count)])


def from_cache(batch: Batch, stored: StoredRows) -> Batch:
    """The batch with what the teacher says of it read from a cache, so that no pass of the teacher runs."""
    return replace(batch, teachers={"teacher": TeacherBatch(batch.teacher, ahead=StoredSignals(stored))})


def timed(call: Callable[[], None], device: torch.device, clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = now()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - started


def step(model: Distiller, batch: Batch) -> None:
    loss, _ = model(batch)
    loss.backward()
    model.zero_grad(set_to_none=True)


def plain(student: Tower, batch: Batch) -> None:
    """The step of an ordinary trainer: transformers' own forward pass and loss."""
    inputs = batch.student
    labels = torch.where(inputs.answer, inputs.input_ids, -100)
    out = student.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels, **inputs.pixels)
    out.loss.backward()
    student.model.zero_grad(set_to_none=True)


@torch.inference_mode()
def teacher_alone(teacher: Tower, batch: Batch, where: torch.Tensor) -> None:
    head_alone(teacher, gathered(teacher.read(batch.teacher, teacher.see(batch.teacher)), where))


@torch.inference_mode()
def head_alone(teacher: Tower, kept: torch.Tensor) -> None:
    for rows in kept.split(HEAD_ROWS):
        torch.mm(rows, teacher.head.weight.T)


def show(about: dict, table: list[dict]) -> None:
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    names = list(table[0]["seconds"])
    ratios = ("whole / parts", "ahead / parts", "cached / floor", "floor / sft", "cached / sft", "cached / plain")
    print(f"{'case':<13}{'rows':>6}" + "".join(f"{name + ' ms':>12}" for name in names) + "".join(f"{x:>16}" for x in ratios))
    for row in table:
        times = "".join(f"{1000 * row['seconds'][name]:>12.1f}" for name in names)
        print(f"{row['case']:<13}{row['rows']:>6}{times}" + "".join(f"{row[x]:>16.3f}" for x in ratios))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Samples a second of three training loops on captioned pictures: mmkd, a plain loop over transformers' models, TRL's GOLD.

    python scripts/bench/race.py --vocabulary 640 --threads 1 --clock cpu
    python scripts/bench/race.py --vocabulary 32000 152000 --samples 40 --threads 1 --clock cpu

All distil one teacher into one student: mean forward KL at the caption's tokens, forward, backward and AdamW, on the same
collated batches. The pictures are drawn, their captions of 4 to 24 words. The plain loops are what one writes with
`transformers.Trainer` and a `compute_loss` of one's own: "logits" takes the answers' rows from the logits of all positions,
"rows" takes the hidden states and puts only the answers' rows through the heads. All methods take turns batch by batch in one
process; medians (least and most), and the medians of the ratios of one batch. GOLD (on-policy share 0) needs `trl`, which mmkd
does not.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import step as bench
import torch
from gold import gold_of
from PIL import Image
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.towers.tower import Tower
from mmkd.train.batch import Batch, Pair, TeacherPart
from mmkd.train.collate import Collator
from mmkd.train.distiller import Distiller

METHODS = ("mmkd", "rows", "logits", "gold")
SIZES = {"teacher": (384, 6), "student": (192, 3), "image": 112, "patch": 14}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[640, 32000, 152000])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "gold" or find_spec("trl")])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| vocabulary | method | samples a second | batch ms | mmkd is faster | loss |\n|---" + "|---" * 5 + "|")
    for vocabulary in options.vocabulary:
        raced(vocabulary, options, device)


def raced(vocabulary: int, options: argparse.Namespace, device: torch.device) -> None:
    sizes = {**SIZES, "vocabulary": vocabulary}
    teacher, student = (bench.tower(sizes, role, device, "float32") for role in ("teacher", "student"))
    teacher.freeze()
    batches = [batch.to(device) for batch in batches_of(student, teacher, options)]
    optimiser = torch.optim.AdamW(student.model.parameters(), lr=0.0, weight_decay=0.0)  # every method has the same student
    losses = losses_of(student, teacher, options.methods)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    values = {}
    for number, batch in enumerate([batches[0], *batches]):  # the first warms up
        for name, loss in losses.items():

            def step(name: str = name, loss: Callable[[Batch], torch.Tensor] = loss, batch: Batch = batch) -> None:
                values[name] = loss(batch)
                values[name].backward()
                optimiser.step()
                optimiser.zero_grad()

            taken = bench.timed(step, device, options.clock)
            if number:
                seconds[name].append(taken)
        first = values["mmkd"].item()
        if wrong := {name: value.item() for name, value in values.items() if abs(value.item() / first - 1) > 1e-4}:
            sys.exit(f"the losses of a batch differ: mmkd {first}, {wrong}")
    for name, times in seconds.items():
        ratio = statistics.median(other / own for own, other in zip(seconds["mmkd"], times, strict=True))
        middle, low, high = (1000 * found(times) for found in (statistics.median, min, max))
        cells = f"{1000 * options.batch / middle:.1f} | {middle:.0f} ({low:.0f} - {high:.0f}) | {ratio:.2f}"
        print(f"| {vocabulary:,} | {name} | {cells} | {values[name].item():.6f} |", flush=True)


def batches_of(student: Tower, teacher: Tower, options: argparse.Namespace) -> list[Batch]:
    draw, pairs = random.Random(0), []
    for number in range(options.samples):
        side = SIZES["image"]
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))
        caption = " ".join(draw.choices(("red", "green", "blue"), k=draw.randint(4, 24)))
        turns = (Turn("user", "red green blue", 1), Turn("assistant", caption))
        sample = Sample(str(number), (ImageRef(Path(), "none"),), turns)
        own, other = (tower.encode(sample, pictures=[picture]) for tower in (student, teacher))
        pairs.append(Pair(own, {"teacher": TeacherPart(other)}))
    collator = Collator(student, teacher)
    return [collator(pairs[n : n + options.batch])["batch"] for n in range(0, len(pairs) - options.batch + 1, options.batch)]


# ---- the loops -------------------------------------------------------------------------------------------------------


def losses_of(student: Tower, teacher: Tower, methods: list[str]) -> dict[str, Callable[[Batch], torch.Tensor]]:
    """The loss of a batch, by method."""
    distiller = Distiller(student, teacher, [bench.term("forward_kl", "response")])
    made = {"mmkd": lambda batch: distiller.train()(batch)[0]}
    for name, whole in (("rows", False), ("logits", True)):
        trainer = plain(student, teacher, whole)
        made[name] = lambda batch, trainer=trainer: trainer.compute_loss(student.model.train(), inputs_of(batch))
    if "gold" in methods:
        gold = gold_of(student, teacher)
        made["gold"] = lambda batch: gold.compute_loss(student.model.train(), inputs_of(batch))
    return {name: made[name] for name in METHODS if name in methods}


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    read = batch.student
    labels = torch.where(read.answer, read.input_ids, -100)
    return {"input_ids": read.input_ids, "attention_mask": read.attention_mask, "labels": labels, **read.pixels}


class PlainTrainer(Trainer):
    """Forward KL at the answers' tokens, as one writes it; whole: from the logits of all positions."""

    teacher_model: torch.nn.Module
    whole: bool

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        where = F.pad(inputs.pop("labels")[:, 1:] != -100, (0, 1))  # the rows that predict an answer's tokens
        with torch.no_grad():
            theirs = self.logits(self.teacher_model, inputs, where)
        ours = self.logits(model, inputs, where)
        return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")

    def logits(self, model, inputs, where):
        if self.whole:
            return model(**inputs).logits[where]
        return model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state[where])


def plain(student: Tower, teacher: Tower, whole: bool) -> PlainTrainer:
    arguments = TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=student.device.type == "cpu", disable_tqdm=True)
    trainer = PlainTrainer(model=student.model, args=arguments)
    trainer.teacher_model, trainer.whole = teacher.model, whole
    return trainer


if __name__ == "__main__":
    main()

"""What the visual switch costs: a Switch-KD step against the passes that it is made of, measured in one run.

    python scripts/bench/switch.py --repeats 15 --json runs/bench/switch.json

All variants run in turn, `--repeats` times; medians are compared. On a CPU the clock is the process's own CPU time, so that other
processes do not count; on a GPU it is the wall clock behind a synchronisation.

    plain             student forward and backward with cross-entropy alone
    distil            the same with DBiLD against the teacher's ordinary pass ("student step")
    teacher_forward   see, read and the head's response rows, without gradients
    switch_forward    the same from given vision features, with gradients to them: activations are kept
    switch_backward   from the response rows back to these features; no gradient to the teacher's weights
    switch            the whole step: cross-entropy, DBiLD, and DBiLD through the switch
    recomputed        the same with `teacher.gradient_checkpointing`
    cached            the whole step with the teacher's ordinary rows from a cache: of the teacher, only the switched pass runs

The bars: switch <= 1.15 * (distil + switch_forward + switch_backward), in which every pass of the step stands once on either
side, and cached <= 1.15 * (plain + switch_forward + switch_backward), where the teacher is run through once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.engine.rows import RowTerm, row_losses
from mmkd.losses import DBiLD
from mmkd.runs.write_cache import Plan, stored_of
from mmkd.teachers.store import StoredRows
from mmkd.teachers.stored import StoredSignals
from mmkd.teachers.teacher import head_of
from mmkd.terms.spec import TermSpec
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer
from mmkd.towers.recompute import recompute_layers
from mmkd.towers.tower import Tower
from mmkd.train.batch import Batch, TeacherBatch
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny import tiny_samples

CE, ALIGN = TermSpec(kind="cross_entropy").build("ce"), TermSpec(kind="dbild").build("align")
VSD = TermSpec(kind="dbild", path="switch").build("vsd")
SIZES = {  # width and layers of the encoder, the student's and the teacher's language model
    "small": {"vision": (192, 4), "student": (256, 4), "teacher": (512, 8)},
    "large": {"vision": (768, 12), "student": (896, 24), "teacher": (2048, 36)},
}
PIXELS, PATCH = 112, 8  # 196 visual tokens


def tower(part: tuple[int, int], vision: tuple[int, int], tokenizer: Any, seed: int) -> Tower:
    width, layers = part
    dv, lv = vision
    encoder = {"model_type": "vit", "hidden_size": dv, "num_hidden_layers": lv, "num_attention_heads": dv // 64,
               "intermediate_size": 4 * dv, "image_size": PIXELS, "patch_size": PATCH}  # fmt: skip
    language = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
                "num_attention_heads": width // 64, "num_key_value_heads": width // 64}  # fmt: skip
    return assemble(
        VisionSpec(config=encoder, image_size=(PIXELS, PIXELS)), LanguageSpec(config=language), tokenizer=tokenizer, seed=seed
    )


class Bench:
    """Towers, a batch, and the parts that are timed."""

    def __init__(self, size: str, batch: int, words: int, device: torch.device, folder: Path):
        tokenizer = train_tokenizer(["red green blue round square left of right of A B C"] * 4, 300)
        tokenizer.add_tokens([f"<word {n}>" for n in range(words - len(tokenizer))])
        sizes = SIZES[size]
        self.device = device
        self.student = tower(sizes["student"], sizes["vision"], tokenizer, 1)
        self.teacher = tower(sizes["teacher"], sizes["vision"], tokenizer, 2)
        self.again = tower(sizes["teacher"], sizes["vision"], tokenizer, 2).freeze()  # the same, with recomputed layers
        recompute_layers(self.again)
        for each in (self.student, self.teacher, self.again):
            each.model.to(device)
        terms = [CE, ALIGN, VSD]
        dataset = PairDataset(tiny_samples(folder, batch), self.student, self.teacher, terms)
        self.batch = Collator(self.student, self.teacher)([dataset[i] for i in range(batch)])["batch"].to(device)
        self.steps = {
            "plain": Distiller(self.student, None, [CE]),
            "distil": Distiller(self.student, self.teacher, [CE, ALIGN]),
            "switch": Distiller(self.student, self.teacher, terms),
            "recomputed": Distiller(self.student, self.again, terms),
            "cached": Distiller(self.student, self.teacher, terms),
        }
        self.cached = self._cached(dataset, ["response"])
        with torch.no_grad():
            self.features = [f.clone() for f in self.student.see(self.batch.student).features]

    def _cached(self, dataset: PairDataset, positions: list[str]) -> Batch:
        """The batch as it comes with a cached teacher."""
        encoded = [dataset[i].teachers["teacher"].inputs for i in range(len(dataset))]
        plan = Plan(list(dataset.samples), positions, features=False, precision="float32", top_k=None)
        signals = StoredSignals(StoredRows.join(stored_of(plan, self.teacher, encoded)).to(self.device))
        return replace(self.batch, teachers={"teacher": TeacherBatch(None, self.batch.switch, signals)})

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def step(self, name: str) -> None:
        distiller = self.steps[name].train()
        distiller.zero_grad(set_to_none=True)
        loss, _ = distiller(self.cached if name == "cached" else self.batch)
        loss.backward()

    @torch.no_grad()
    def teacher_forward(self) -> Tensor:
        inputs = self.batch.teacher
        hidden = self.teacher.read(inputs, self.teacher.see(inputs))
        return self.teacher.head(hidden[inputs.response])

    def switch_forward(self) -> Tensor:
        leaves = [f.requires_grad_() for f in self.features]
        hidden = self.teacher.read(self.batch.switch, self.teacher.project(leaves))[self.batch.switch.response]
        term = RowTerm("vsd", 1.0, DBiLD(), True)
        head = head_of(self.teacher)
        targets = self.batch.switch.targets[self.batch.switch.response]
        return row_losses(hidden, head, targets, [term], teacher_hidden=hidden.detach(), teacher_head=head)[0]

    def parts(self) -> dict[str, Callable[[], float]]:
        def seconds(function: Callable[[], Any]) -> float:
            started = self.now()
            function()
            return self.now() - started

        def backward() -> float:
            loss = self.switch_forward()
            return seconds(loss.backward)

        timed: dict[str, Callable[[], float]] = {name: lambda n=name: seconds(lambda: self.step(n)) for name in self.steps}
        return timed | {
            "teacher_forward": lambda: seconds(self.teacher_forward),
            "switch_forward": lambda: seconds(self.switch_forward),
            "switch_backward": backward,
        }


def measure(bench: Bench, repeats: int) -> dict[str, list[float]]:
    parts = bench.parts()
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 2):  # two rounds to warm up
        for name, part in parts.items():
            seconds = part()
            if turn >= 2:
                found[name].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=8000, help="vocabulary")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path("runs/bench/pictures")
    bench = Bench(options.size, options.batch, options.words, device, folder)
    seconds = measure(bench, options.repeats)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    passes = median["distil"] + median["switch_forward"] + median["switch_backward"]
    once = median["plain"] + median["switch_forward"] + median["switch_backward"]
    ratios = {
        "switch / (distil + switch_forward + switch_backward)": median["switch"] / passes,
        "recomputed / (distil + switch_forward + switch_backward)": median["recomputed"] / passes,
        "switch / (plain + switch_forward + switch_backward)": median["switch"] / once,
        "cached / (plain + switch_forward + switch_backward)": median["cached"] / once,
    }
    for name, values in seconds.items():
        print(f"{name:<16} {1000 * median[name]:8.1f} ms  ({1000 * min(values):.1f} - {1000 * max(values):.1f})")
    for name, value in ratios.items():
        print(f"{value:6.3f}  {name}")
    if options.json:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        facts = {"torch": torch.__version__, "machine": platform.processor(), "device": str(device), "options": given}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "seconds": seconds, "ratios": ratios}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`mmkd estimate`: what a recipe will take on this machine, from a few measured steps, and what to change if it does not fit."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmkd.data.samples import Sample
from mmkd.engine.positions import rows_at
from mmkd.errors import DataError, RecipeError
from mmkd.recipes.recipe import Recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.data import all_samples, texts_of
from mmkd.runs.plan import bytes_text, disk_line, loss_memory, term_text
from mmkd.runs.preflight import preflight
from mmkd.runs.towers import build_student, load_teachers
from mmkd.runs.write_cache import forecast_of, plan_of
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term
from mmkd.towers.loading import half_of
from mmkd.towers.tower import Tower
from mmkd.train.batch import Batch
from mmkd.train.build_stage import Stage, build_stage
from mmkd.train.distiller import Distiller
from mmkd.train.optimisers import OPTIMISERS
from mmkd.train.spec import StageSpec
from mmkd.train.trainer import optimiser_of

logger = logging.getLogger(__name__)

TIMED = 3  # steps that are timed, after one that is not
GIB = 2**30
# Parts of a step's memory, in the order of the table.
PARTS = ("teacher weights", "student weights", "gradients", "optimiser", "activations", "losses")


@dataclass
class StageEstimate:
    """What a stage takes in one process: bytes by part, seconds a step, and the naive losses' bytes for comparison."""

    name: str
    steps: int
    batch: int
    micro_batch: int
    seconds: float
    memory: dict[str, int]
    naive_losses: int
    terms: str
    remedies: list[tuple[str, int]] = field(default_factory=list)  # (what to change, bytes that it saves)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def lines(self, limit: int) -> list[str]:
        count = self.batch // self.micro_batch
        pieces = f" ({count} micro-batches of {self.micro_batch})" if count > 1 else ""
        found = [
            f"stage {self.name}: {self.steps:,} steps of {self.batch}{pieces}, {1000 * self.seconds:,.0f} ms each: "
            f"{_duration(self.steps * self.seconds)}",
            f"  terms: {self.terms}",
        ]
        for part in PARTS:
            naive = f"   (a naive computation: {bytes_text(self.naive_losses)})" if part == "losses" and self.naive_losses else ""
            found.append(f"  {part:<16}{bytes_text(self.memory[part]):>12}{naive}")
        found.append(f"  {'together':<16}{bytes_text(self.total):>12}   of {bytes_text(limit)}")
        return found + (self._changes(limit) if self.total > limit else [])

    def _changes(self, limit: int) -> list[str]:
        found, left = ["  it does not fit; from the largest saving to the smallest:"], self.total
        for change, saved in sorted(self.remedies, key=lambda remedy: -remedy[1]):
            left -= saved
            found.append(f"    {change:<48} saves {bytes_text(saved)}" + (": then it fits" if left <= limit else ""))
            if left <= limit:
                return found
        rest = f"    with all of these it takes {bytes_text(left)}: take smaller towers, or shard the student (docs/scale.md)"
        return [*found, rest]


def estimate(recipe: Recipe, memory: float | None = None) -> str:
    """The estimate of a recipe as text. memory: GiB that it must fit into; by default what this machine has."""
    samples = all_samples(recipe)
    teachers = load_teachers(recipe)
    student = build_student(recipe, teachers, texts_of(samples))
    recipe = with_answers_apart(recipe, student, teachers)
    samples = all_samples(recipe)
    preflight(recipe, student, teachers)
    limit = available_memory() if memory is None else int(memory * GIB)
    lines = [f"{recipe.title}: on {_device_name(student)}, {bytes_text(limit)}"]
    for name, spec in recipe.stages.items():
        found, student = stage_estimate(recipe, name, spec, samples[name], student, teachers)
        lines += ["", *found.lines(limit)]
    return "\n".join([*lines, "", *_cache_lines(recipe, teachers), disk_line(recipe, student)])


def stage_estimate(
    recipe: Recipe, name: str, spec: StageSpec, samples: list[Sample], student: Tower, teachers: Mapping[str, Teacher]
) -> tuple[StageEstimate, Tower]:
    """Measures a few steps of one stage; the student's weights stay as they are. Also the student as the stage leaves it."""
    batch = spec.optimiser.batch_size
    micro = min(spec.optimiser.micro_batch_size or batch, batch)
    stage = build_stage(name, spec, recipe, student, teachers, _longest(samples, micro))
    distiller, student = stage.distiller, stage.student
    begun = time.perf_counter()
    taken = stage.batch_of(micro)
    generating = time.perf_counter() - begun if stage.answers.generates else 0.0
    seconds, activations = _measure(distiller, taken, spec)
    seconds += generating
    rows = _row_count(taken, stage.terms)
    ours, naive = loss_memory(student, stage.teachers, stage.terms, rows, recipe.chunk_bytes)
    trained = [p for p in distiller.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    parts = {
        "teacher weights": sum(_weights(teacher.tower or teacher.body) for teacher in teachers.values()),
        "student weights": _weights(student),
        "gradients": gradients,
        "optimiser": round(OPTIMISERS[spec.optimiser.kind].moments * gradients),  # in the weights' dtype
        "activations": activations,
        "losses": ours,
    }
    steps = spec.steps or int((spec.epochs or 1) * (len(samples) // batch))
    terms = ", ".join(term_text(t) for t in stage.terms)
    found = StageEstimate(name, steps, batch, micro, seconds * (batch // micro), parts, naive, terms)
    found.remedies = remedies(stage, teachers, parts, micro)
    stage.leave()
    return found, student


def remedies(
    stage: Stage, teachers: Mapping[str, Teacher], parts: dict[str, int], micro: int
) -> list[tuple[str, int]]:
    """Changes of the recipe that save memory, as overrides, with the bytes that each saves."""
    found, spec, name = [], stage.spec, stage.name
    if micro > 1:
        fewer = max(1, micro // 4)
        found.append((f"stages.{name}.optimiser.micro_batch_size={fewer}", round(parts["activations"] * (1 - fewer / micro))))
    elif not spec.gradient_checkpointing:
        # What stays are the inputs of the layers: a tenth is on the safe side for a transformer.
        found.append((f"stages.{name}.gradient_checkpointing=true", round(parts["activations"] * 0.9)))
    if (tower := next((teacher.tower for teacher in teachers.values() if not teacher.stored), None)) is not None:
        head = sum(t.numel() * t.element_size() for t in tower.head.state_dict().values())
        if not any(t.switched for t in stage.terms):
            found.append(("mmkd cache, then teacher.cache=FOLDER", parts["teacher weights"] - head))
        elif next(tower.model.parameters()).dtype == torch.float32:
            found.append(("teacher.dtype=bfloat16", parts["teacher weights"] // 2))
    if spec.lora is None and "language" in spec.train and spec.upcycle is None:
        own = stage.student.part_parameters()["language"]
        found.append((f"stages.{name}.lora.rank=16", 3 * sum(p.numel() * p.element_size() for _, p in own if p.requires_grad)))
    return [(change, saved) for change, saved in found if saved > 0]


def _longest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Some samples spread over the set, the longest first: a step must fit with these too."""
    some = samples[:: max(1, len(samples) // (8 * count))]
    return sorted(some, key=lambda s: (len(s.images), sum(len(t.text) for t in s.turns)), reverse=True)


def _measure(distiller: Distiller, batch: Batch, stage: StageSpec) -> tuple[float, int]:
    """(seconds of a micro-step, bytes kept for backward). The learning rate is 0: no weight changes."""
    distiller.train()
    still = {"weight_decay": 0.0, "learning_rate": 0.0, "learning_rates": {}}
    optimiser = optimiser_of(distiller, stage.optimiser.model_copy(update=still))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = []
    for number in range(TIMED + 1):
        _synchronise(batch)
        started = time.perf_counter()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor) if number == 0 else nullcontext()
        half = half_of(stage.precision)
        with hooks, torch.autocast(distiller.tower.device.type, half) if half is not None else nullcontext():
            loss, _ = distiller(batch)
        if not loss.requires_grad:
            raise DataError("the terms reach no trained parameter; train the part that they act on")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        _synchronise(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), sum(kept.values())


def _synchronise(batch: Batch) -> None:
    if batch.student.input_ids.is_cuda:
        torch.cuda.synchronize()


def _row_count(batch: Batch, terms: Sequence[Term]) -> int:
    """Rows of logits of a micro-batch."""
    pairs = any(t.needs_pairs for t in terms)
    positions = {t.positions for t in terms if t.reads_logits and not t.needs_pairs} | ({"response"} if pairs else set())
    twice = 1 + pairs  # the rejected answers too
    return twice * sum(int(rows_at(batch.on_host.student, name).sum()) for name in positions)


def _weights(tower: Tower) -> int:
    return sum(p.numel() * p.element_size() for p in tower.model.parameters() if not p.is_meta)


def _cache_lines(recipe: Recipe, teachers: Mapping[str, Teacher]) -> list[str]:
    kept = [line for teacher in teachers.values() if (line := teacher.storage()) is not None]
    if kept or len(teachers) != 1:
        return kept
    try:
        plan = plan_of(recipe, None)
    except RecipeError:  # no term compares with the teacher
        return []
    (teacher,) = teachers.values()
    return [f"a cache of the teacher: {forecast_of(plan, teacher.running())}"] if plan.samples else []


def available_memory() -> int:
    """Bytes of the accelerator, else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_name(tower: Tower) -> str:
    return torch.cuda.get_device_name() if tower.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

"""`mmkd estimate`: what a recipe will take on this machine, from a few measured steps, and what to change if it does not fit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from mmkd.base.distributed import world_size
from mmkd.data.samples import Sample
from mmkd.engine.positions import rows_at
from mmkd.errors import RecipeError
from mmkd.recipes.recipe import Recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.data import all_samples, texts_of
from mmkd.runs.kept import keeps
from mmkd.runs.measure import Measured, candidates, measure, size, spread_count
from mmkd.runs.plan import bytes_text, disk_line, loss_memory, term_text
from mmkd.runs.preflight import preflight
from mmkd.runs.towers import build_student, load_teachers
from mmkd.runs.write_cache import forecast_of, plan_of
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term
from mmkd.towers.tower import Tower
from mmkd.train.batch import Batch
from mmkd.train.build_stage import Stage, build_stage
from mmkd.train.collate import encode_whole
from mmkd.train.optimisers import OPTIMISERS
from mmkd.train.skips import LEFT_OUT
from mmkd.train.spec import StageSpec

logger = logging.getLogger(__name__)

PREPARED = 8  # samples whose preparation is timed
GIB = 2**30
# Parts of a step's memory, in the order of the table.
PARTS = ("teacher weights", "student weights", "gradients", "optimiser", "activations", "losses")


@dataclass
class StageEstimate:
    """What a stage takes in one process: bytes by part, seconds a step, and the naive losses' bytes for comparison."""

    name: str
    steps: int
    batch: int
    micro_batches: int
    seconds: float
    memory: dict[str, int]
    naive_losses: int
    terms: str
    remedies: list[tuple[str, int]] = field(default_factory=list)  # (what to change, bytes that it saves)
    fits: int = 1  # samples of a micro-batch that were measured
    preparing: float = 0.0  # seconds that a sample takes in one process, before it can be trained on
    distinct: int = 0  # samples that are prepared
    workers: int = 0  # that prepare them, beside training
    once: float = 0.0  # seconds that the teacher takes to read every sample once, where it is kept

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def all_seconds(self) -> float:
        """Of the whole stage. Workers prepare while others train."""
        training, data = self.steps * self.seconds, self.distinct * self.preparing / max(1, self.workers)
        return self.once + (max(training, data) if self.workers else training + data)

    def lines(self, limit: int) -> list[str]:
        pieces = f" ({self.micro_batches} micro-batches)" if self.micro_batches > 1 else ""
        took = f"{1000 * self.seconds:,.0f} ms each" if self.seconds else "not timed, since it does not fit here"
        found = [f"stage {self.name}: {self.steps:,} steps of {self.batch}{pieces}, {took}: {_duration(self.all_seconds)}"]
        if self.preparing:
            found.append(f"  with {1000 * self.preparing:.1f} ms to prepare a sample once, {self.workers or 'no'} workers")
        if self.once:
            found.append(f"  with {_duration(self.once)} in which the teacher reads every sample once (teacher.keep)")
        found.append(f"  terms: {self.terms}")
        if not self.fits:
            found.append(
                "  not even one sample fits, so what is below is without activations; first try gradient_checkpointing: true, "
                "precision: bfloat16 and a smaller max_length"
            )
        for part in PARTS:
            naive = f"   (a naive computation: {bytes_text(self.naive_losses)})" if part == "losses" and self.naive_losses else ""
            found.append(f"  {part:<16}{bytes_text(self.memory[part]):>12}{naive}")
        found.append(f"  {'together':<16}{bytes_text(self.total):>12}   of {bytes_text(limit)}")
        return found + (self._changes(limit) if self.total > limit or not self.fits else [])

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
    recipe: Recipe, name: str, spec: StageSpec, samples: Sequence[Sample], student: Tower, teachers: Mapping[str, Teacher]
) -> tuple[StageEstimate, Tower]:
    """Measures a few steps of one stage; the student's weights stay as they are. Also the student as the stage leaves it."""
    batch = max(1, spec.optimiser.batch_size // world_size())  # of one process
    micro = min(spec.optimiser.micro_batch_size or batch, batch)
    chosen = candidates(samples, batch if spec.optimiser.micro_batch_tokens is not None else micro)
    stage = build_stage(name, spec, recipe, student, teachers, chosen)
    student, pairs = stage.student, list(stage.usable())
    some = spread_count(batch if spec.optimiser.micro_batch_tokens is not None else micro)
    found = measure(stage, pairs[:some], sorted(pairs, key=size, reverse=True), micro, batch)
    parts = _memory(stage, teachers, found, recipe.chunk_bytes)
    steps = spec.steps or int((spec.epochs or 1) * (len(samples) // spec.optimiser.batch_size))
    shown = StageEstimate(
        name, steps, spec.optimiser.batch_size, found.micro_batches, found.seconds, parts.memory, parts.naive_losses,
        ", ".join(term_text(t) for t in stage.terms), fits=found.held, preparing=preparing_seconds(stage, chosen),
        distinct=min(len(samples), steps * spec.optimiser.batch_size), workers=recipe.workers,
    )  # fmt: skip
    if keeps(recipe) and not stage.of_pairs:
        shown.once = found.teacher_seconds * shown.distinct / spec.optimiser.batch_size
        shown.seconds -= found.teacher_seconds
    shown.remedies = remedies(stage, teachers, parts.memory, micro)
    stage.leave()
    return shown, student


@dataclass
class _Parts:
    memory: dict[str, int]
    naive_losses: int


def _memory(stage: Stage, teachers: Mapping[str, Teacher], found: Measured, chunk_bytes: int) -> _Parts:
    """Bytes by part. What a step was measured to hold: gradients, losses, and as the rest activations, the teacher's too."""
    rows = _row_count(found.rows_of, stage.terms) if found.rows_of is not None else 0
    ours, naive = loss_memory(stage.student, stage.teachers, stage.terms, rows, chunk_bytes)
    gradients = sum(p.numel() * p.element_size() for p in stage.distiller.parameters() if p.requires_grad)
    parts = {
        "teacher weights": sum(_weights(teacher.tower or teacher.body) for teacher in teachers.values()),
        "student weights": _weights(stage.student),
        "gradients": gradients,
        "optimiser": round(OPTIMISERS[stage.spec.optimiser.kind].moments * gradients),  # in the weights' dtype
        "activations": max(0, found.bytes - gradients - min(ours, found.bytes)),
        "losses": min(ours, found.bytes),
    }
    return _Parts(parts, naive)


def preparing_seconds(stage: Stage, samples: Sequence[Sample]) -> float:
    """Seconds that one process takes to read and prepare a sample for all models."""
    towers = {id(stage.student.preparer): stage.student}
    for name, teacher in stage.teachers.items():
        if not (teacher.stored or stage.dataset.alike[name]):
            towers[id(teacher.body.preparer)] = teacher.body
    some, started = samples[:PREPARED], time.perf_counter()
    for sample in some:
        for tower in towers.values():
            with suppress(*LEFT_OUT):
                encode_whole(tower, sample)
    return (time.perf_counter() - started) / max(1, len(some))


def remedies(
    stage: Stage, teachers: Mapping[str, Teacher], parts: dict[str, int], micro: int
) -> list[tuple[str, int]]:
    """Changes of the recipe that save memory, as overrides, with the bytes that each saves."""
    found, spec, name = [], stage.spec, stage.name
    tokens = spec.optimiser.micro_batch_tokens
    if tokens is not None:
        found.append((f"stages.{name}.optimiser.micro_batch_tokens={max(1, tokens // 4)}", round(parts["activations"] * 0.75)))
    elif micro > 1:
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

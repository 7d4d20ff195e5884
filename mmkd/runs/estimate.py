"""`mmkd estimate`: what a recipe will take on this machine, from a few measured steps, and what to change if it does not fit."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmkd.errors import DataError
from mmkd.data.samples import Sample
from mmkd.teachers.stored import CachedTower
from mmkd.runs.write_cache import forecast_of, plan_of
from mmkd.train.collate import Batch, PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.preference import PreferenceDataset, PreferenceDistiller
from mmkd.runs.run import check_answers
from mmkd.train.experts import upcycled
from mmkd.runs.stages import add_lora, build_student, load_teacher, set_trainable, stage_samples, terms_of
from mmkd.terms.term import Term
from mmkd.train.trainer import parameter_groups
from mmkd.runs.plan import bytes_text, disk_line, loss_memory
from mmkd.errors import RecipeError
from mmkd.recipes.recipe import Recipe, StageSpec
from mmkd.towers.tower import Tower

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
    remedies: list[tuple[str, int]] = field(default_factory=list)  # (what to change, bytes that it saves)

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def lines(self, limit: int) -> list[str]:
        count = self.batch // self.micro_batch
        pieces = f" ({count} micro-batches of {self.micro_batch})" if count > 1 else ""
        found = [
            f"stage {self.name}: {self.steps:,} steps of {self.batch}{pieces}, {1000 * self.seconds:,.0f} ms each: "
            f"{_duration(self.steps * self.seconds)}"
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
    samples = {name: stage_samples(recipe, stage) for name, stage in recipe.stages.items()}
    check_answers(samples)
    teacher = load_teacher(recipe)
    student = build_student(recipe, teacher, [t.text for stage in samples.values() for s in stage for t in s.turns])
    limit = available_memory() if memory is None else int(memory * GIB)
    lines = [f"{recipe.title}: on {_device_name(student)}, {bytes_text(limit)}"]
    for name, stage in recipe.stages.items():
        student, _ = upcycled(stage, student, recipe.seed)
        lines += ["", *stage_estimate(recipe, name, stage, samples[name], student, teacher).lines(limit)]
    return "\n".join([*lines, "", *_cache_lines(recipe, teacher), disk_line(recipe, student)])


def stage_estimate(
    recipe: Recipe, name: str, stage: StageSpec, samples: list[Sample], student: Tower, teacher: Tower | None
) -> StageEstimate:
    """Measures a few steps of one stage; the student's weights stay as they are."""
    if stage.lora is not None:
        add_lora(student, stage.lora)
    set_trainable(student, stage)
    terms = terms_of(stage.terms)
    of_pairs = any(t.is_preference for t in terms)
    needed = teacher if any(t.needs_teacher and not t.is_preference for t in terms) else None
    batch = stage.optimiser.batch_size
    micro = min(stage.optimiser.micro_batch_size or batch, batch)
    dataset = (PreferenceDataset if of_pairs else PairDataset)(_longest(samples, micro), student, needed, terms)
    if of_pairs:
        dataset.reference.zero_()
    distiller = (PreferenceDistiller if of_pairs else Distiller)(
        student, needed, terms, chunk_bytes=recipe.chunk_bytes, compiled=recipe.compile
    )
    taken = dataset.collator([dataset[i] for i in range(len(dataset))])["batch"].to(student.device)
    seconds, activations = _measure(distiller, taken, stage)
    rows = _row_count(taken, terms)
    ours, naive = loss_memory(student, needed, terms, rows, recipe.chunk_bytes)
    trained = [p for p in distiller.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    parts = {
        "teacher weights": _weights(teacher),
        "student weights": _weights(student),
        "gradients": gradients,
        "optimiser": 2 * gradients,  # AdamW's two moments, in the weights' dtype
        "activations": activations,
        "losses": ours,
    }
    steps = stage.steps or int((stage.epochs or 1) * (len(samples) // batch))
    found = StageEstimate(name, steps, batch, micro, seconds * (batch // micro), parts, naive)
    found.remedies = remedies(recipe, name, stage, teacher, parts, micro, student)
    return found


def remedies(
    recipe: Recipe, name: str, stage: StageSpec, teacher: Tower | None, parts: dict[str, int], micro: int, student: Tower
) -> list[tuple[str, int]]:
    """Changes of the recipe that save memory, as overrides, with the bytes that each saves."""
    found = []
    if micro > 1:
        fewer = max(1, micro // 4)
        found.append((f"stages.{name}.optimiser.micro_batch_size={fewer}", round(parts["activations"] * (1 - fewer / micro))))
    elif not stage.gradient_checkpointing:
        # What stays are the inputs of the layers: a tenth is on the safe side for a transformer.
        found.append((f"stages.{name}.gradient_checkpointing=true", round(parts["activations"] * 0.9)))
    if teacher is not None and not isinstance(teacher, CachedTower):
        head = sum(t.numel() * t.element_size() for t in teacher.head.state_dict().values())
        switched = any(t.path == "switch" for t in terms_of(stage.terms))
        if not switched:
            found.append(("mmkd cache, then teacher.cache=FOLDER", parts["teacher weights"] - head))
        elif next(teacher.model.parameters()).dtype == torch.float32:
            found.append(("teacher.dtype=bfloat16", parts["teacher weights"] // 2))
    if stage.lora is None and "language" in stage.train and stage.upcycle is None:
        of_language = sum(p.numel() * p.element_size() for _, p in student.part_parameters()["language"] if p.requires_grad)
        found.append((f"stages.{name}.lora.rank=16", 3 * of_language))
    return [(change, saved) for change, saved in found if saved > 0]


def _longest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The longest of some samples spread over the set: a step must fit with these too."""
    some = samples[:: max(1, len(samples) // (8 * count))]
    return sorted(some, key=lambda s: (len(s.images), sum(len(t.text) for t in s.turns)), reverse=True)[:count]


def _measure(distiller: Distiller, batch: Batch, stage: StageSpec) -> tuple[float, int]:
    """(seconds of a micro-step, bytes kept for backward). The learning rate is 0: no weight changes."""
    distiller.train()
    optimiser = torch.optim.AdamW(parameter_groups(distiller, stage.optimiser.model_copy(update={"weight_decay": 0.0})), lr=0.0)
    for group in optimiser.param_groups:
        group["lr"] = 0.0
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
        half = stage.precision == "bfloat16"
        with hooks, torch.autocast(distiller.tower.device.type, torch.bfloat16) if half else nullcontext():
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
    positions = {t.positions for t in terms if t.is_row_term} | ({"response"} if any(t.is_preference for t in terms) else set())
    twice = 1 + any(t.is_preference for t in terms)  # the rejected answers too
    return twice * sum(int(getattr(batch.on_host.student, name).sum()) for name in positions)


def _weights(tower: Tower | None) -> int:
    if tower is None:
        return 0
    return sum(p.numel() * p.element_size() for p in tower.model.parameters() if not p.is_meta)


def _cache_lines(recipe: Recipe, teacher: Tower | None) -> list[str]:
    if teacher is None:
        return []
    if isinstance(teacher, CachedTower):
        return [f"teacher cache: {len(teacher.cache):,} samples, {teacher.cache.rows:,} rows in {teacher.cache.folder}"]
    try:
        plan = plan_of(recipe, None)
    except RecipeError:  # no term compares with the teacher
        return []
    return [f"a cache of the teacher: {forecast_of(plan, teacher)}"] if plan.samples else []


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

"""`mmkd cache RECIPE`: the teacher reads every sample of a recipe once, and what the terms compare with is kept.

Any number of processes share the samples by RANK and WORLD_SIZE; they need not know of one another. Started again, each goes
on with what is missing.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkd.base.bars import bar
from mmkd.base.checksums import sums_in
from mmkd.base.distributed import is_main_process, rank, world_size
from mmkd.base.files import room_for, synced
from mmkd.data.lazy import joined, taken
from mmkd.data.samplers.length import lengths_of
from mmkd.data.samples import Sample
from mmkd.engine.positions import gathered, rows_at
from mmkd.engine.rows import Head, row_log_probs
from mmkd.errors import DataError, NotFiniteError, RecipeError
from mmkd.recipes.recipe import Recipe
from mmkd.recipes.writes import after_training
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.data import all_samples, stage_samples, texts_of
from mmkd.runs.preflight import preflight
from mmkd.runs.teacher_answers import with_teacher_answers
from mmkd.runs.towers import build_student, load_teachers, openings
from mmkd.runs.writes import write_all
from mmkd.teachers.live import as_teachers
from mmkd.teachers.store import (
    KINDS,
    About,
    ShardWriter,
    StoredRows,
    TeacherCache,
    content_key,
    teacher_files,
    text_key,
    with_hashes,
)
from mmkd.teachers.stored import save_body, wanted
from mmkd.teachers.teacher import head_of
from mmkd.terms.spec import build_terms
from mmkd.towers.finite import not_finite
from mmkd.towers.loading import half_of
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.train.guards import check_pixels_of_set
from mmkd.train.preference import PreferenceDataset
from mmkd.train.reference import fill_reference
from mmkd.train.skips import LEFT_OUT, allowance
from mmkd.train.streaming import stage_stream

logger = logging.getLogger(__name__)

PROBE = 512  # samples whose rows are counted for the forecast
SAMPLE_BYTES, IMAGE_BYTES = 3 * 16 + 3 * 8, 16  # of a shard's index
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What is to be kept of which samples."""

    samples: Sequence[Sample]  # of all stages, each once
    positions: list[str]
    features: bool
    precision: str
    top_k: int | None


@dataclass(frozen=True)
class Forecast:
    """samples, rows, bytes a row (index included), bytes of the vision features and of the head; all of a whole cache."""

    samples: int
    rows: int
    row_bytes: float
    feature_bytes: float
    head_bytes: int

    @property
    def total(self) -> float:
        return self.rows * self.row_bytes + self.feature_bytes + self.head_bytes

    def __str__(self) -> str:
        features = f", vision features {self.feature_bytes / GIB:,.3f} GiB" if self.feature_bytes else ""
        return (
            f"{self.samples:,} samples, about {self.rows:,} rows of {self.row_bytes:,.0f} bytes{features}, "
            f"head {self.head_bytes / GIB:,.3f} GiB: {self.total / GIB:,.3f} GiB"
        )


def write_cache(
    recipe: Recipe, folder: Path, *, top_k: int | None = None, batch_size: int = 16, workers: int = 0, forecast_only: bool = False
) -> dict[str, Any]:
    """Fills the cache `folder` with what a recipe's terms compare with; returns what was found and done.

    top_k: keep the k likeliest tokens of each row instead of its last hidden state.
    Raises DataError where nothing is to be cached, where `folder` holds another cache (with the differences), and where the
    forecast does not fit the disk; GuardError where pictures do not reach the teacher.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    live = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"cache": None})})
    if recipe.writes.keys() - recipe.written.keys():
        live = _written(live)
        recipe = live.model_copy(update={"teacher": recipe.teacher})
    plan, samples = plan_of(recipe, top_k), all_samples(live)
    talks = any(sample.answers > 1 for stage in samples.values() for sample in stage)
    talks = talks or any(spec.target == "teacher" for stage in live.stages.values() for spec in stage.data)
    if not talks:  # else the towers decide which samples there are
        check_folder(live, folder, plan)
    teachers = load_teachers(live)
    student = build_student(live, teachers, texts_of(samples))
    if talks:
        live = with_answers_apart(live if forecast_only else with_teacher_answers(live, teachers), student, teachers)
        plan = plan_of(recipe.model_copy(update={"stages": live.stages}), top_k)
        check_folder(live, folder, plan)
    preflight(live, student, teachers, processes=1, writes=False)  # those that write a cache do not train together
    del student
    (teacher,) = (teacher.running() for teacher in teachers.values())
    if (folder / "cache.json").exists() and (day := About.load(folder).date):  # one that is gone on with
        teacher.preparer.day = dt.date.fromisoformat(day)
    facts: dict[str, Any] = {"folder": str(folder)}
    if plan.samples:
        facts["forecast"] = forecast_of(plan, teacher)
        logger.info("forecast: %s", facts["forecast"])
    if forecast_only:
        return facts
    if plan.samples:
        check_space(folder, facts["forecast"])
    claim_folder(live, folder, plan, teacher)
    if plan.samples:
        facts |= _fill(plan, teacher, folder, batch_size, workers, recipe.guards.pixels_matter)
    if is_main_process():  # two numbers a pair: one process does it
        facts["pairs"] = _fill_references(live, folder, teacher, batch_size)
    return facts


def plan_of(recipe: Recipe, top_k: int | None) -> Plan:
    """Raises DataError for a recipe without a teacher, or with several, or whose terms compare with none."""
    if len(recipe.teacher_specs) != 1:
        count = "no teacher" if not recipe.teacher_specs else f"{len(recipe.teacher_specs)} teachers"
        raise RecipeError(f"this recipe has {count}; a cache keeps the signals of one, so there is nothing to cache")
    ((name, opening),) = openings(recipe).items()
    rows = {stage: recipe.stages[stage] for stage, terms in opening.terms.items() if terms}
    if not rows and not any(t.needs_pairs for t in recipe.all_terms().values()):
        raise RecipeError("no term of this recipe compares with the teacher, so there is nothing to keep")
    if own := [stage for stage, spec in rows.items() if spec.generates]:
        raise RecipeError(
            f"stage {', '.join(own)} learns from answers that the student will give, which no cache can hold; train it with the "
            "teacher itself"
        )
    terms = [term for own in opening.terms.values() for term in own]
    switched = [f"{stage}.{t.name}" for stage, own in opening.terms.items() for t in own if t.switched]
    if switched:
        logger.info("%s: the switched pass goes through the teacher anew in each step", ", ".join(switched))
    streamed = [stage for stage, spec in rows.items() if stage_stream(spec, recipe.seed, recipe.data_root) is not None]
    if streamed:
        raise RecipeError(f"stages {', '.join(streamed)} read streams, which have no end; write their samples down to cache them")
    samples = each_once([stage_samples(recipe, spec) for spec in rows.values()])
    features = any(t.asks("teacher.features") for t in terms)
    positions = sorted(frozenset().union(*(t.teacher_positions for t in terms)))
    precision = wanted(recipe.teacher_specs[name], opening)["precision"]
    return Plan(samples, positions, features, precision, top_k)


def each_once(stages: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    """The samples of all stages without those that say the same as one before; of large sets only their places are held."""
    known: set[bytes] = set()
    parts = []
    for samples in stages:
        places = []
        for place, sample in enumerate(samples):
            names = "\n".join(image.key for image in sample.images)
            key = text_key(sample) + hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if key not in known:
                known.add(key)
                places.append(place)
        parts.append(taken(samples, places))
    return joined(parts)


# ---- forecast --------------------------------------------------------------------------------------------------------


def forecast_of(plan: Plan, teacher: Tower) -> Forecast:
    """Rows are counted on some samples and fitted to what is known of all: turns, characters and pictures."""
    some = _spread(plan.samples, PROBE)
    counted = [(sample, n) for sample in some if (n := _row_count(plan, teacher, sample)) is not None]
    if not counted:
        raise DataError(f"none of {len(some)} probed samples can be prepared: {_why(teacher, some[0])}")
    known, rows = [sample for sample, _ in counted], np.array([n for _, n in counted], dtype=float)
    fit, *_ = np.linalg.lstsq(_facts(known), rows, rcond=None)
    total = max(0.0, float((_facts(plan.samples) @ fit).sum()))
    encoded = _encoded(teacher, known)
    probe = StoredRows.join(stored_of(plan, teacher, encoded))
    parts = (probe.kinds, probe.tokens, probe.scores, *probe.signal.values())
    row = sum(t[0].numel() * t.element_size() for t in parts if len(t))
    images = sum(len(s.images) for s in plan.samples)
    of_image = sum(f.numel() * f.element_size() for f in probe.features) / max(1, sum(e.images for e in encoded))
    head = 0 if plan.top_k is not None else sum(t.numel() * t.element_size() for t in teacher.head.state_dict().values())
    index = len(plan.samples) * SAMPLE_BYTES + images * IMAGE_BYTES
    return Forecast(len(plan.samples), round(total), row + index / max(1.0, total), images * of_image, head)


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    return list(samples[:: max(1, len(samples) // count)][:count])


def _facts(samples: Sequence[Sample]) -> np.ndarray:
    """What the number of rows follows from: [S, 5]"""
    def of(sample: Sample) -> list[int]:
        answers = [t.text for t in sample.turns if t.role == "assistant"]
        others = [t.text for t in sample.turns if t.role != "assistant"]
        return [1, len(answers), sum(map(len, answers)), sum(map(len, others)), len(sample.images)]

    return np.array([of(sample) for sample in samples], dtype=float)


def _row_count(plan: Plan, teacher: Tower, sample: Sample) -> int | None:
    try:
        encoded = teacher.encode(sample)
    except LEFT_OUT:
        return None
    return int((rows_of(plan, teacher.collate([_without_pixels(encoded)])) != 0).sum())


def _why(teacher: Tower, sample: Sample) -> str:
    try:
        teacher.encode(sample)
    except LEFT_OUT as error:
        return str(error)
    return ""


def _encoded(teacher: Tower, samples: Sequence[Sample]) -> list[Encoded]:
    """Two of the samples, with pictures if there are any: enough for widths and dtypes."""
    pictured = [sample for sample in samples if sample.images] or list(samples)
    return [teacher.encode(sample) for sample in pictured[:2]]


def _without_pixels(encoded: Encoded) -> Encoded:
    return Encoded(encoded.id, encoded.input_ids, encoded.targets, {}, encoded.images)


def check_space(folder: Path, forecast: Forecast) -> None:
    """Raises DataError where the rest of the forecast is more than the disk has left."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    written = sum(path.stat().st_size for path in folder.glob("shards/*.safetensors"))
    free = shutil.disk_usage(there).free
    if forecast.total - written > free:
        raise DataError(
            f"the cache needs {forecast.total / GIB:,.1f} GiB, {written / GIB:,.1f} of it are written, but {there} has only "
            f"{free / GIB:,.1f} GiB left; take another disk (teacher.cache=FOLDER), no terms on visual or prompt positions, or "
            "--top-k 64"
        )


# ---- the folder ------------------------------------------------------------------------------------------------------


def about_of(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    ((name, spec),) = recipe.teacher_specs.items()
    return wanted(spec, openings(recipe)[name]) | {"top_k": plan.top_k, "rows": plan.positions, "features": plan.features}


def check_folder(recipe: Recipe, folder: Path, plan: Plan) -> None:
    """Raises DataError for a folder that holds a cache of something else, with every difference."""
    if not (folder / "cache.json").exists():
        return
    about = About.load(folder)
    about.check_body(folder)
    if differences := about.differences(about_of(recipe, plan)):
        raise DataError(
            f"{folder} is another cache:\n  " + "\n  ".join(differences) + "\nSet teacher.cache=ANOTHER_FOLDER, or delete it"
        )


def claim_folder(recipe: Recipe, folder: Path, plan: Plan, teacher: Tower) -> None:
    """Writes cache.json and the teacher's body, if they are not there."""
    if (folder / "cache.json").exists():
        return
    files = teacher_files(recipe.teacher.model) or {}
    rule, vocabulary = teacher.logit_rule, min(teacher.vocabulary, teacher.head.weight.shape[0])
    body = folder / "teacher"
    if not body.exists():
        partial = folder / f".teacher.{uuid.uuid4().hex[:8]}"
        with room_for(partial):
            save_body(teacher, partial, with_head=plan.top_k is None)
            synced(partial)
        try:
            partial.rename(body)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    hashed = with_hashes(recipe.teacher.model, files)
    day = teacher.preparer.day.isoformat() if teacher.preparer.prints_day else None
    facts = about_of(recipe, plan) | {"files": hashed, "fingerprint": teacher.fingerprint(), "date": day}
    About(**facts, logit_rule=list(rule), vocabulary=vocabulary, body=sums_in(body)).save(folder)


# ---- filling ---------------------------------------------------------------------------------------------------------


class _Prepared(Dataset):
    """Batches of (key, text key, encoding by the teacher, sample), each sample once; a message in the place of one that cannot be
    prepared, and nothing where all of a batch is known.

    A batch is read as a whole or not at all: what stands beside a sample may change its last bits, and a cache that was killed
    and goes on is to hold those of an undisturbed one.
    """

    def __init__(self, samples: Sequence[Sample], teacher: Tower, known: TeacherCache, batch_size: int):
        self.batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self.teacher, self.known = teacher, known

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[bytes, bytes, Encoded]], list[str]]:
        keys: dict[bytes, Sample] = {}
        left_out = []
        for sample in self.batches[index]:
            try:
                keys.setdefault(content_key(sample), sample)
            except LEFT_OUT as error:
                left_out.append(str(error))
        items = []
        for key, sample in keys.items() if any(key not in self.known for key in keys) else ():
            try:
                items.append((key, text_key(sample), self.teacher.encode(sample)))
            except LEFT_OUT as error:
                left_out.append(str(error))
        return len(self.batches[index]), items, left_out


def _fill(plan: Plan, teacher: Tower, folder: Path, batch_size: int, workers: int, pixels_matter: bool) -> dict[str, Any]:
    # Samples of like length side by side: less padding. The longest first: what does not fit the memory fails at once.
    order = sorted(range(len(plan.samples)), key=lengths_of(plan.samples).__getitem__, reverse=True)
    mine = taken(plan.samples, order[rank() :: world_size()])
    known = TeacherCache(folder)
    loader = DataLoader(_Prepared(mine, teacher, known, batch_size), batch_size=None, num_workers=workers)
    writer = ShardWriter(folder, rank())
    written: set[bytes] = set()
    done = unreadable = 0
    checked = not pixels_matter
    with bar(len(mine), "teacher cache", "sample", shown=is_main_process()) as told:
        for count, items, left_out in loader:
            unreadable += _log_left_out(left_out)
            if items:
                keys, texts, encoded = zip(*items, strict=True)
                if not checked:
                    check_pixels_of_set("teacher", teacher, mine, batch_size)
                    checked = True
                stored = zip(keys, texts, stored_of(plan, teacher, encoded), strict=True)
                new = {key: (key, text, one) for key, text, one in stored if key not in known and key not in written}
                for entry in new.values():
                    writer.add(*entry)
                written |= set(new)
                done += len(new)
            told.update(count)
    writer.close()
    return {"samples": len(mine), "read": done, "unreadable": unreadable, "rows": writer.rows, "bytes": writer.bytes}


def _log_left_out(wrong: Sequence[str]) -> int:
    for message in wrong:
        logger.warning("left out: %s", message)
    return len(wrong)


def rows_of(plan: Plan, inputs: TowerInputs) -> Tensor:
    """Bits of the kinds that are kept, 0 for a row of none of them. [B, L] uint8"""
    kinds = torch.zeros_like(inputs.input_ids, dtype=torch.uint8)
    for name in plan.positions:
        kinds |= rows_at(inputs, name).to(torch.uint8) * KINDS[name]
    return kinds


def stored_of(plan: Plan, teacher: Tower, encoded: Sequence[Encoded]) -> list[StoredRows]:
    """What the teacher says of some samples, one entry each."""
    inputs = teacher.collate(encoded)
    kinds = rows_of(plan, inputs)  # [B, L]
    where = kinds != 0
    tokens = torch.where(inputs.response, inputs.targets, inputs.next_ids)[where]  # [N]
    response = inputs.response[where]  # [N]
    there = inputs.to(teacher.device)
    half = half_of(plan.precision)
    with torch.inference_mode(), torch.autocast(teacher.device.type, half) if half is not None else nullcontext():
        seen = teacher.see(there)
        hidden = gathered(teacher.read(there, seen), where)  # [N, D]
    if not_finite([("hidden", hidden), *(("features", f) for f in seen.features)]):
        raise NotFiniteError(
            f"what the teacher says of {', '.join(inputs.ids[:4])} is not finite; check its weights, or take another dtype "
            "(bfloat16 instead of float16). What was written before is whole"
        )
    with torch.no_grad():
        head, vocabulary = head_of(teacher), min(teacher.vocabulary, teacher.head.weight.shape[0])
        scores = torch.zeros(len(tokens))
        scores[response] = row_log_probs(
            hidden[response.to(hidden.device)], head, tokens[response].to(hidden.device), vocabulary=vocabulary
        ).float().cpu()
        signal = {"hidden": hidden} if plan.top_k is None else top_rows(hidden, head, vocabulary, plan.top_k)
    signal = {name: tensor.cpu() for name, tensor in signal.items()}
    stored = StoredRows(kinds[where], tokens.int(), scores, signal, [])
    return _by_sample(plan, inputs, where, stored, [f.cpu() for f in seen.features])


def _by_sample(plan: Plan, inputs: TowerInputs, where: Tensor, stored: StoredRows, features: list[Tensor]) -> list[StoredRows]:
    found, row, image = [], 0, 0
    for count, visual, images in zip(where.sum(1).tolist(), inputs.visual.sum(1).tolist(), inputs.images, strict=True):
        rows = slice(row, row + count)
        per_image = [visual // images] * images if images and "visual" in plan.positions else []
        own = features[image : image + images] if plan.features else []
        signal = {name: tensor[rows] for name, tensor in stored.signal.items()}
        found.append(StoredRows(stored.kinds[rows], stored.tokens[rows], stored.scores[rows], signal, per_image, own))
        row, image = row + count, image + images
    return found


def _written(recipe: Recipe) -> Recipe:
    """The recipe with what its write stages wrote. Raises DataError for what is written in the middle of training alone."""
    if late := [name for name in recipe.writes if after_training(recipe, name)]:
        raise DataError(
            f"stage {late[0]} asks a student that was trained, so its rows are not known before training; take the cache out of "
            "this recipe, and let the teacher read each batch"
        )
    return write_all(recipe)


def top_rows(hidden: Tensor, head: Head, vocabulary: int, k: int, chunk_rows: int = 64) -> dict[str, Tensor]:
    """The k likeliest tokens of each row [N, D], their log-probabilities, and the log of what all others have together.

    The normaliser runs over `vocabulary` columns. Raises DataError for a k that is not below it.
    """
    if not 0 < k < vocabulary:
        raise DataError(f"top_k is {k}; it must be above 0 and below the vocabulary, {vocabulary}")
    found: dict[str, list[Tensor]] = {"ids": [], "log_probs": [], "tail": []}
    for rows in hidden.split(chunk_rows):
        logits = (rows.to(head.weight.dtype) @ head.weight[:vocabulary].T).float()  # [n, V]
        logits = (logits if head.bias is None else logits + head.bias[:vocabulary]) * head.scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        log_p = logits.log_softmax(-1)
        top = log_p.topk(k, -1)
        found["ids"].append(top.indices.int())
        found["log_probs"].append(top.values.half())
        found["tail"].append(log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1))
    empty = {"ids": (0, k), "log_probs": (0, k), "tail": (0,)}
    return {name: torch.cat(parts) if parts else torch.zeros(empty[name]) for name, parts in found.items()}


def _fill_references(recipe: Recipe, folder: Path, teacher: Tower, batch_size: int) -> int:
    """Log-probabilities of the preference stages' pairs; returns how many the teacher read."""
    read = 0
    for stage in recipe.stages.values():
        terms = build_terms(stage.terms)
        if not any(t.needs_pairs for t in terms):
            continue
        samples = stage_samples(recipe, stage)
        student = build_student(recipe, as_teachers(teacher), texts_of({"": samples}))
        pairs = PreferenceDataset(samples, student, None, terms, max_skipped=allowance(recipe.guards.max_skipped, len(samples)))
        read += fill_reference(
            pairs, teacher, folder / "references", batch_size=batch_size, chunk_bytes=recipe.chunk_bytes,
            pixels_matter=recipe.guards.pixels_matter,
        )
    return read


def describe(facts: dict[str, Any], recipe_path: str) -> str:
    """What was done, for the terminal."""
    if "read" not in facts and not is_main_process():
        return ""
    lines = []
    if "read" in facts:
        lines.append(
            f"{facts['read']:,} of {facts['samples']:,} samples were read, the others were there; wrote {facts['rows']:,} rows, "
            f"{facts['bytes']:,} bytes" + (f"; {facts['unreadable']:,} samples cannot be prepared" if facts["unreadable"] else "")
        )
    if facts.get("pairs"):
        lines.append(f"{facts['pairs']:,} preference pairs")
    return "\n".join([*lines, f"use it: mmkd distill {recipe_path} teacher.cache={facts['folder']}"])

"""Answers of a teacher to the questions of training data (`target: teacher`): asked once, kept beside the runs, gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmkd.base.bars import bar
from mmkd.base.distributed import alone_in
from mmkd.base.jsonl import JsonLines
from mmkd.data.samplers.length import lengths_of
from mmkd.data.samples import Sample
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import entry_samples, entry_state
from mmkd.teachers.live import load_tower
from mmkd.teachers.teacher import Teacher
from mmkd.towers.tower import Tower
from mmkd.towers.vision_cache import VisionCache

logger = logging.getLogger(__name__)

FOLDER = "answers"  # beside the runs, shared by all that would ask the same
MAX_NEW_TOKENS = 256
BATCH = 64
PICTURES = 256 * 2**20  # bytes of visual tokens that are kept meanwhile


def with_teacher_answers(recipe: Recipe, teachers: Mapping[str, Teacher]) -> Recipe:
    """The recipe with a file of the teacher's answers in every data entry of `target: teacher`. Raises DataError."""
    return _changed(recipe, lambda spec: spec.target == "teacher" and spec.answers is None, teachers)


def all_by_teacher(recipe: Recipe, teachers: Mapping[str, Teacher]) -> Recipe:
    """The recipe with the teacher's answers in the place of all others. Raises DataError."""
    return _changed(recipe, lambda spec: spec.from_ is None and not (spec.target == "teacher" and spec.answers), teachers)


def _changed(recipe: Recipe, asks: Callable[[DataSpec], bool], teachers: Mapping[str, Teacher]) -> Recipe:
    if not any(asks(spec) for stage in recipe.stages.values() for spec in stage.data):
        return recipe
    if len(teachers) != 1:
        raise DataError(f"`target: teacher` needs one teacher, there are {len(teachers)}; give answers by `answers: FILE`")
    ((name, teacher),) = teachers.items()
    stages = {}
    for key, stage in recipe.stages.items():
        data = [_answered(recipe, spec, name, teacher) if asks(spec) else spec for spec in stage.data]
        stages[key] = stage.model_copy(update={"data": data})
    return recipe.model_copy(update={"stages": stages})


def _answered(recipe: Recipe, spec: DataSpec, name: str, teacher: Teacher) -> DataSpec:
    """The data entry with a file of answers, which is written here where it is not there yet."""
    asked = spec.model_copy(update={"target": "teacher", "answers": None})
    samples = {sample.id: sample for sample in entry_samples(recipe, asked)}
    several = [sample.id for sample in samples.values() if sample.answers > 1]
    if several:
        raise DataError(
            f"target: teacher: {len(several)} samples have several answers, first {several[0]!r}, and a teacher's would not "
            "fit what is said after them; take data of one answer each"
        )
    facts = [teacher.fingerprint(), recipe.teacher_specs[name].model, MAX_NEW_TOKENS, entry_state(recipe, asked)]
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = Path(recipe.output).parent / FOLDER / key
    with alone_in(folder, "the same answers", wait=True):  # one of several processes asks, the others find it done
        _ask(folder / "answers.jsonl", list(samples.values()), recipe, name, teacher)
    return asked.model_copy(update={"answers": str(folder / "answers.jsonl")})


def _ask(path: Path, samples: Sequence[Sample], recipe: Recipe, name: str, teacher: Teacher) -> None:
    """Asks what has no answer yet.

    Batches depend on the questions alone and are asked whole: an answer may depend, in its last bits, on what stands beside it.
    Questions on one picture are asked together: what stands before them is then read once (see `mmkd.towers.greedy`).
    """
    file = JsonLines(path, errors="backslashreplace", durable=True)
    file.drop_torn_line()
    known = {row["id"] for row in file.rows()}
    line = _by_picture(samples)
    batches = [line[start : start + BATCH] for start in range(0, len(line), BATCH)]
    todo = [batch for batch in batches if not all(sample.id in known for sample in batch)]
    if not todo:
        return
    tower, cache = tower_of(recipe, name, teacher), VisionCache(PICTURES)
    logger.info("the %s answers %d questions of %d, once for all runs beside this one", name, sum(map(len, todo)), len(samples))
    with bar(sum(map(len, todo)), "teacher answers", "question") as told:
        for batch in todo:
            answers = tower.answer(batch, max_new_tokens=MAX_NEW_TOKENS, vision_cache=cache)
            new = zip(batch, answers, strict=True)
            file.append({"id": sample.id, "answer": answer} for sample, answer in new if sample.id not in known)
            told.update(len(batch))


def _by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """The samples picture by picture, the longest first; one without a picture stands alone."""
    lengths = [text for _, text in lengths_of(samples)]
    pictures: dict[object, list[int]] = {}
    for place, sample in enumerate(samples):
        pictures.setdefault(tuple(ref.key for ref in sample.images) or place, []).append(place)
    ordered = sorted(pictures.values(), key=lambda places: -max(lengths[place] for place in places))
    return [samples[place] for places in ordered for place in sorted(places, key=lambda place: -lengths[place])]


def tower_of(recipe: Recipe, name: str, teacher: Teacher) -> Tower:
    """The model of a teacher, loaded where it is a cache. Raises TowerError."""
    if teacher.tower is not None:
        return teacher.tower
    return load_tower(recipe.teacher_specs[name], recipe.max_length)

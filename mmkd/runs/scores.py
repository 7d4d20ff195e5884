"""What models say of a stage's samples, for samplers that choose by it: asked once before the stage, kept beside the runs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmkd.base.bars import bar
from mmkd.base.distributed import alone_in
from mmkd.base.jsonl import JsonLines
from mmkd.data.samplers.scored import ByScores
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import data_state, stage_samples
from mmkd.runs.teacher_answers import tower_of
from mmkd.teachers.teacher import Teacher, check_vocabularies
from mmkd.towers.sampling import Sampling, text_of
from mmkd.towers.sampling import sample as sample_answers
from mmkd.towers.tower import Tower
from mmkd.train.measured import BATCH, answer_losses, first_words
from mmkd.train.skips import LEFT_OUT
from mmkd.writing.words import folded

logger = logging.getLogger(__name__)

FOLDER = "scores"
WORDS = 256  # first words whose probabilities are kept: those of the answers of the data, the most frequent first


def with_scores(recipe: Recipe, name: str, teachers: Mapping[str, Teacher], student: Tower) -> Recipe:
    """The recipe with a file of scores for the sampler of a stage that needs one. Raises DataError, TowerError."""
    stage = recipe.stages[name]
    order = stage.order.order()
    needs = getattr(order, "needs", ())
    if not needs or order.scores:
        return recipe
    towers: dict[str, Callable[[], Tower]] = {"student": lambda: student}
    if order.of_teacher:
        if len(teachers) != 1:
            raise DataError(f"stages.{name}.sampler: it asks one teacher, there are {len(teachers)}; name a file as `scores`")
        ((of, teacher),) = teachers.items()
        towers["teacher"] = lambda: tower_of(recipe, of, teacher)
    if "reference" in needs:
        towers["reference"] = lambda: Tower.load(order.reference, max_length=recipe.max_length, device=student.device).freeze()
    prints = [student.fingerprint() if {"student", "margin", "probabilities", "tries"} & set(needs) else None]
    prints += [teacher.fingerprint() for teacher in teachers.values() if order.of_teacher]
    facts = [prints, getattr(order, "reference", ""), sorted(needs), data_state(recipe, stage), recipe.max_length]
    facts += [order.how] if order.how else []
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    folder = Path(recipe.output).parent / FOLDER / key
    with alone_in(folder, "the same scores", wait=True):
        _write(folder / "scores.jsonl", stage_samples(recipe, stage), order, towers, name)
    sampler = stage.order.model_copy(update={"scores": str(folder / "scores.jsonl")})
    stages = {**recipe.stages, name: stage.model_copy(update={"sampler": sampler, "group_by_length": False})}
    return recipe.model_copy(update={"stages": stages})


def _write(
    path: Path, samples: Sequence[Sample], order: ByScores, towers: Mapping[str, Callable[[], Tower]], name: str
) -> None:
    file = JsonLines(path, errors="backslashreplace", durable=True)
    file.drop_torn_line()
    known = {row["id"] for row in file.rows()}
    todo = [sample for sample in {sample.id: sample for sample in samples}.values() if sample.id not in known]
    if not todo:
        return
    opened, needs = {who: make() for who, make in towers.items()}, order.needs
    words = _words(opened["student"], samples) if "probabilities" in needs else None
    if "teacher_probabilities" in needs:
        check_vocabularies(opened["student"], opened["teacher"])
    logger.info("stage %s: %s of %d samples, for its sampler", name, ", ".join(needs), len(todo))
    with bar(len(todo), "scores", "sample") as told:
        for start in range(0, len(todo), 64):
            batch = todo[start : start + 64]
            columns = {need: _values(need, opened, batch, words, order.how) for need in needs}
            file.append({"id": one.id, **{need: column[n] for need, column in columns.items()}} for n, one in enumerate(batch))
            told.update(len(batch))


def _values(
    need: str, towers: Mapping[str, Tower], batch: Sequence[Sample], words: torch.Tensor | None, how: Mapping[str, Any]
) -> list[Any]:
    """The values of one name; a sample that cannot be prepared, and will be left out of training, has the least of all."""
    who, _, what = need.rpartition("_")
    tower = towers[who or "student"] if what in ("margin", "probabilities", "tries") else towers[need.partition("_")[0]]
    if what == "tries":
        return _each(lambda some: answers_until_right(tower, some, **how), batch, 0)
    if what not in ("margin", "probabilities"):
        shown = [replace(sample.without_images(), meta={}) for sample in batch] if what == "blind" else batch
        return [loss / max(1, count) for loss, count in _each(lambda some: answer_losses(tower, some), shown, (0.0, 1))]
    spread = _each(lambda some: first_words(tower, some), batch, torch.ones(tower.vocabulary))
    if what == "margin":
        return [float(top[0] - top[1]) for top in (one.topk(2).values for one in spread)]
    return [one[words].tolist() for one in spread]


def answers_until_right(tower: Tower, samples: Sequence[Sample], cap: int, temperature: float, max_new_tokens: int) -> list[int]:
    """How many answers to each sample were drawn up to the first that says what the data say; cap + 1 where none does.

    The n-th answer to a sample depends on its id and n alone, so a lower cap changes nothing but what stays unsolved.
    """
    if len(samples) > BATCH:
        parts = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
        return [tries for part in parts for tries in answers_until_right(tower, part, cap, temperature, max_new_tokens)]
    found, how = [cap + 1] * len(samples), Sampling(max_new_tokens, temperature)
    prompts = [(tower.encode(sample, with_answer=False), tuple(ref.key for ref in sample.images)) for sample in samples]
    for number in range(1, cap + 1):
        rest = [place for place, tries in enumerate(found) if tries > cap]
        seeds = [_seed(f"try {number} {samples[place].id}") for place in rest]
        said = sample_answers(tower, [prompts[place] for place in rest], seeds, how) if rest else []
        for place, ids in zip(rest, said, strict=True):
            if folded(text_of(tower.tokenizer, ids)) == folded(samples[place].answer):
                found[place] = number
    return found


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _each(ask: Callable[[Sequence[Sample]], list], batch: Sequence[Sample], otherwise: Any) -> list[Any]:
    try:
        return ask(batch)
    except LEFT_OUT:
        found = []
        for sample in batch:
            try:
                found += ask([sample])
            except LEFT_OUT:
                found.append(otherwise)
        return found


def _words(tower: Tower, samples: Sequence[Sample]) -> torch.Tensor:
    """The first tokens of the data's answers, the most frequent first."""
    counts: dict[int, int] = {}
    for sample in samples:
        try:
            first = tower.answer_tokens(sample, sample.answer)[0]
        except LEFT_OUT:
            continue
        counts[first] = counts.get(first, 0) + 1
    return torch.tensor(sorted(counts, key=lambda token: (-counts[token], token))[:WORDS])

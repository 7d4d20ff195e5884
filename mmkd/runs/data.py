"""The training samples of a recipe's stages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mmkd.answers import generating
from mmkd.data.entries import read_samples, stream_of
from mmkd.data.fingerprint import fingerprint, samples_fingerprint
from mmkd.data.lazy import Lazy, is_lazy, joined
from mmkd.data.mixup import mixed
from mmkd.data.other_answers import STAND_IN
from mmkd.data.preference import rejected_of
from mmkd.data.samples import Sample, Turn
from mmkd.data.spec import DataSpec
from mmkd.data.tally import Tally
from mmkd.data.views import with_views
from mmkd.errors import DataError, SampleError, one_line
from mmkd.recipes.recipe import Recipe
from mmkd.teachers.view import View, ViewSpec
from mmkd.terms.spec import build_terms
from mmkd.train.spec import StageSpec

FEW = 1000  # samples of a large set that are looked at where all of a small one are


def stage_samples(recipe: Recipe, stage: StageSpec) -> Sequence[Sample]:
    """All training samples of a stage, in the order of its data entries. Raises DataError."""
    samples = joined(stage_parts(recipe, stage))
    if not samples:
        raise DataError("a stage has no samples")
    rejected = any(source.of_pairs for _, source in generating(stage.answers).values())
    if rejected or any(t.needs_pairs for t in build_terms(stage.terms)):
        for sample in samples[:FEW] if is_lazy(samples) else samples:
            rejected_of(sample)
    return samples


def stage_parts(recipe: Recipe, stage: StageSpec) -> list[Sequence[Sample]]:
    """The samples of each data entry of a stage. Raises DataError."""
    return [entry_samples(recipe, spec, bool(stage.one_answer)) for spec in stage.data]


def entry_samples(recipe: Recipe, spec: DataSpec, one_answer: bool = False) -> Sequence[Sample]:
    """The samples of a data entry. one_answer: a sample for each of its answers. Raises DataError.

    Of one that reads what a write stage has not written yet: what that asks about, each with a stand-in for its answer.
    """
    if is_unwritten(spec):
        return _stand_ins(recipe, spec)
    return _entry(recipe, spec, one_answer)[0]


def asked_entry(spec: DataSpec) -> DataSpec:
    """A data entry of a write stage, which asks about its samples whether or not they have answers."""
    return spec if spec.from_ is not None else spec.model_copy(update={"target": "teacher", "answers": None})


def is_unwritten(spec: DataSpec) -> bool:
    """Whether a data entry reads what a write stage has not written yet."""
    return spec.from_ is not None and spec.root is None


def _stand_ins(recipe: Recipe, spec: DataSpec) -> list[Sample]:
    found: list[Sample] = []
    for entry in recipe.writes[spec.from_].data:
        samples = entry_samples(recipe, asked_entry(entry))
        some = samples[:FEW] if is_lazy(samples) else samples
        found += [replace(sample, turns=(*sample.prompt_turns, Turn("assistant", STAND_IN))) for sample in some]
    return found[: spec.limit]


def rows_left_out(recipe: Recipe) -> dict[str, dict[str, int]]:
    """By stage how many rows of its data cannot be used, for which reason; stages that use all of theirs are left out."""
    found: dict[str, dict[str, int]] = {}
    for name, stage in recipe.stages.items():
        for tally in (_entry(recipe, spec, bool(stage.one_answer))[1] for spec in stage.data if not is_unwritten(spec)):
            for reason, places in tally.dropped.items():
                counts = found.setdefault(name, {})
                counts[reason] = counts.get(reason, 0) + len(places)
    return found


def samples_by_entry(recipe: Recipe) -> dict[str, list[int | None]]:
    """By stage how many samples each of its data entries has; None where nobody knows: of a stream, of rows not written yet."""
    return {name: [_count(recipe, spec, bool(stage.one_answer)) for spec in stage.data] for name, stage in recipe.stages.items()}


def _count(recipe: Recipe, spec: DataSpec, one_answer: bool) -> int | None:
    if is_unwritten(spec) or stream_of(spec, recipe.seed, recipe.data_root) is not None:
        return None
    return len(entry_samples(recipe, spec, one_answer))


def _entry(recipe: Recipe, spec: DataSpec, one_answer: bool) -> tuple[Sequence[Sample], Tally]:
    """The samples of a data entry, and what was left out."""
    state = json.dumps(fingerprint(spec, recipe.data_root))
    seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
    return _read_once(spec.model_dump_json(), seed, recipe.data_root, recipe.guards.max_skipped, one_answer, state)


@lru_cache(maxsize=8)  # stages, the control, the student and checks before them read the same data one after another
def _read_once(
    entry: str, seed: int, data_root: str | None, allowed: float, one_answer: bool, state: str
) -> tuple[Sequence[Sample], Tally]:
    tally, spec = Tally(), DataSpec.model_validate_json(entry)
    samples = read_samples(spec, seed, data_root, allowed, tally)
    if one_answer:
        samples = AnswersApart(samples) if is_lazy(samples) else [one for sample in samples for one in sample.by_answer()]
    return mixed(with_views(_asked(samples, spec), spec.views, seed), spec.mixup, seed), tally


def _asked(samples: Sequence[Sample], spec: DataSpec) -> Sequence[Sample]:
    """The samples behind the prompt of `asked`. Raises DataError for no template, and where fields lack."""
    if spec.asked is None:
        return samples
    try:
        view = View(ViewSpec(prompt=spec.asked).prompt)
        if is_lazy(samples):
            return samples.then(view) if isinstance(samples, Lazy) else Lazy(samples, view)
        return [view(sample) for sample in samples]
    except (ValueError, SampleError) as error:
        raise DataError(f"data.asked: {one_line(str(error).replace('teacher.prompt', 'it'), 300)}") from error


class AnswersApart(Lazy[Sample]):
    """A sample for each answer of the samples of a large set; how many answers each has is counted once."""

    def __init__(self, samples: Sequence[Sample]):
        counts = np.fromiter((max(1, sample.answers) for sample in samples), dtype=np.int64, count=len(samples))
        first = np.cumsum(counts) - counts
        rows = np.repeat(np.arange(len(samples)), counts)
        super().__init__(_Numbered(samples, rows, np.arange(len(rows)) - first[rows]), _answer_apart)


class _Numbered(Sequence[tuple[Sample, int]]):
    def __init__(self, samples: Sequence[Sample], rows: np.ndarray, numbers: np.ndarray):
        self.samples, self.rows, self.numbers = samples, rows, numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Sample, int]:  # type: ignore[override]
        return self.samples[int(self.rows[index])], int(self.numbers[index])


def _answer_apart(entry: tuple[Sample, int]) -> Sample:
    sample, number = entry
    return sample.by_answer()[number]


def data_state(recipe: Recipe, stage: StageSpec) -> list:
    """A stage's data by content: data that were changed make a new control, whatever lies beside them does not."""
    files = [fingerprint(spec, recipe.data_root) for spec in stage.data]
    return [*files, samples_fingerprint(stage_samples(recipe, stage))]


def entry_state(recipe: Recipe, spec: DataSpec) -> list:
    """A data entry by content."""
    return [fingerprint(spec, recipe.data_root), samples_fingerprint(entry_samples(recipe, spec))]


def files_of(recipe: Recipe) -> dict[str, dict[str, dict[str, str]]]:
    """By stage and data entry the annotation files with the hashes of their contents."""
    return {
        name: {str(number): fingerprint(spec, recipe.data_root)["files"] for number, spec in enumerate(stage.data)}
        for name, stage in (*recipe.stages.items(), *recipe.writes.items())
    }


def all_samples(recipe: Recipe) -> dict[str, Sequence[Sample]]:
    """The samples of every stage. Raises DataError for what is wrong with them."""
    samples = {name: stage_samples(recipe, stage) for name, stage in recipe.stages.items()}
    check_answers(samples)
    return samples


def check_answers(stages: dict[str, Sequence[Sample]]) -> None:
    for name, samples in stages.items():
        empty = [s.id for s in (samples[:FEW] if is_lazy(samples) else samples) if not s.answer.strip()]
        if empty:
            raise DataError(f"stage {name}: {len(empty)} samples have an empty answer, first: {', '.join(empty[:5])}")


class Texts:
    """What a student's own tokenizer is trained on: the texts of all stages' samples, read when they are asked for."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]]):
        self._samples = samples

    def __iter__(self) -> Iterator[str]:
        return (turn.text for stage in self._samples.values() for sample in stage for turn in sample.turns)


def texts_of(samples: Mapping[str, Sequence[Sample]]) -> Texts:
    return Texts(samples)

"""From raw samples to one batch: student and teachers prepare the SAME samples, each by its own processor."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mmkd.data.lazy import is_lazy
from mmkd.data.samples import Sample
from mmkd.engine.positions import COUNTS
from mmkd.errors import DataError, SampleError, TowerError
from mmkd.teachers.live import as_teachers
from mmkd.teachers.teacher import Teacher, check_vocabularies
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.inputs import with_answer_ids
from mmkd.towers.kept import EqualPixels
from mmkd.towers.one_sample import preparing
from mmkd.towers.sampling import text_of
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.train.batch import Batch, Pair, TeacherBatch, TeacherPart
from mmkd.train.skips import LEFT_OUT, Skip, Skips, in_words


class PairDataset(Dataset):
    """Samples prepared by student and teachers. Prepared samples are kept up to `memory` bytes, so later epochs cost nothing.

    What cannot be read or prepared gives a `Skip`, and is counted in `skips`; more than `max_skipped` raise DataError. Workers
    count nothing: who gets their batches counts what these say was skipped.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        student: Tower,
        teachers: Mapping[str, Teacher] | Teacher | Tower | None,
        terms: Sequence[Term],
        *,
        max_skipped: int = 0,
        memory: int = 2 * 2**30,
        workers: int = 0,
        generates: bool = False,
    ):
        """generates: whether other answers to these prompts will be generated (`answered`)."""
        self.generates = generates
        self.samples = samples
        self.student, self.teachers = student, as_teachers(teachers)
        self.alike = {name: teacher.alike(student) for name, teacher in self.teachers.items()}
        self.terms = terms
        self.terms_of = {name: terms_of_teacher(terms, name, self.teachers) for name in self.teachers}
        for teacher in self.teachers.values():
            teacher.check(samples)
        self.skips = Skips(max_skipped, len(samples))
        self.truncated: dict[str, int] = {}  # answer tokens that did not fit, by sample
        self._kept: dict[int, Pair] = {}
        self._pixels = EqualPixels()
        # Each worker keeps what it prepared; of a set that is too large to be read at once nothing comes again soon.
        self._free = 0 if is_lazy(samples) else memory // max(1, workers)

    @property
    def collator(self) -> Collator:
        return Collator(self.student, self.teachers, self.next_usable)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair | Skip:
        pair = self.look(index)
        if isinstance(pair, Skip) and get_worker_info() is None:
            self.skips.add(pair)
        return pair

    def look(self, index: int) -> Pair | Skip:
        """A sample as student and teachers get it, or why it is left out, which is not counted here."""
        pair = self._kept.get(index)
        if pair is None:
            pair = self.prepare(self.samples[index], index)
            if isinstance(pair, Pair) and self._free > 0:
                self._keep(index, pair)
        if isinstance(pair, Skip) or not self._lacks_stored(pair):
            return pair
        whole = self._with_stored(index, pair)
        if index in self._kept:
            self._keep_stored(index, whole)
        return whole

    def next_usable(self, index: int) -> Pair:
        """The first sample behind `index` that can be prepared; after the last comes the first. Raises DataError."""
        for step in range(1, len(self) + 1):
            pair = self[(index + step) % len(self)]
            if isinstance(pair, Pair):
                return pair
        raise DataError(f"none of {len(self)} training samples can be used; see the log for the reasons")

    def _lacks_stored(self, pair: Pair) -> bool:
        """Whether what is on disk of a pair must still be read."""
        return any(teacher.stored and pair.teachers[name].inputs is None for name, teacher in self.teachers.items())

    def _keep_stored(self, index: int, pair: Pair) -> None:
        """Keeps a pair with what was on disk of it, where that takes little and there is room."""
        sizes = [t.bytes_to_keep(pair.teachers[name].inputs) for name, t in self.teachers.items() if t.stored]
        if None not in sizes and sum(sizes) <= self._free:
            self._free -= sum(sizes)
            self._kept[index] = pair

    def _with_stored(self, index: int, pair: Pair) -> Pair:
        """The pair with what is on disk of it."""
        parts = {
            name: replace(part, inputs=self._of_teacher(name, self.samples[index], pair.student))
            if self.teachers[name].stored else part
            for name, part in pair.teachers.items()
        }  # fmt: skip
        return replace(pair, teachers=parts)

    def _of_teacher(self, name: str, sample: Sample, encoded: Encoded) -> object:
        return self.teachers[name].prepare(sample, encoded, student=self.student, alike=self.alike[name])

    def _keep(self, index: int, pair: Pair) -> None:
        self._free -= sum(self._pixels.hold(encoded) for encoded in _encoded_of(pair))
        self._kept[index] = pair

    def prepare(self, sample: Sample, index: int = -1) -> Pair | Skip:
        """A sample as student and teachers get it, or why it is left out. index: -1 for one that is none of the set's own."""
        try:
            pair = self._prepare(sample, keep=index >= 0 and not is_lazy(self.samples))
            pair.index = index
            return pair
        except LEFT_OUT as error:
            return Skip.of(sample, error, index)

    def _prepare(self, sample: Sample, *, keep: bool) -> Pair:
        student = _encode("student", self.student, sample, keep=keep)
        if student.truncated:
            self.truncated[sample.id] = student.truncated
        pair = Pair(student, {name: self._part(name, sample, student, keep=keep) for name in self.teachers})
        pair.facts = {term.name: term.sample_fact(sample) for term in self.terms if term.has_sample_fact}
        if self.generates:
            pair.sample, pair.prompts = sample, self._prompts(sample, student)
        return pair

    def _prompts(self, sample: Sample, student: Encoded) -> dict[str, Encoded]:
        own = self.student.encode(sample, with_answer=False)
        if own.pixels.keys() == student.pixels.keys() and all(torch.equal(own.pixels[n], student.pixels[n]) for n in own.pixels):
            own = replace(own, pixels=student.pixels)  # kept once
        return {"student": own} | {name: t.ask(sample, own, alike=self.alike[name]) for name, t in self.teachers.items()}

    def answered(self, pair: Pair, ids: Sequence[int], draw: int = 0) -> Pair | Skip:
        """A pair with other tokens as its answer, the student's own, or why it is left out. draw: which answer to its prompt."""
        try:
            return self._answered(pair, ids, draw)
        except LEFT_OUT as error:
            return Skip.of(pair.sample, error, -1)

    def _answered(self, pair: Pair, ids: Sequence[int], draw: int) -> Pair:
        towers = {"student": self.student} | {name: teacher.body for name, teacher in self.teachers.items()}
        room = min(towers[role].max_length - len(prompt.input_ids) for role, prompt in pair.prompts.items())
        if room < 1:
            raise SampleError(f"sample {pair.sample.id!r}: its prompt leaves no room for an answer within max_length; raise it")
        ids, prompt = ids[:room], pair.prompts["student"]
        student = with_answer_ids(prompt if not draw else replace(prompt, id=f"{prompt.id} draw {draw + 1}"), ids)
        parts = {}
        for name, teacher in self.teachers.items():
            theirs = pair.prompts[name]
            own = student if theirs is prompt else teacher.answered(pair.sample, theirs, self._ids_for(name, pair.sample, ids))
            parts[name] = self._part(name, pair.sample, student, own)
        return Pair(student, parts, facts=pair.facts)

    def _ids_for(self, name: str, sample: Sample, ids: Sequence[int]) -> Sequence[int]:
        """The answer in a teacher's tokens: the same, or of the same words where its tokenizer is another."""
        body = self.teachers[name].body
        if self.same_ids[name]:
            if unknown := [token for token in ids if token >= len(body.tokenizer)]:
                raise SampleError(f"sample {sample.id!r}: the {name} has no token {unknown[0]}, which the student said")
            return ids
        words = body.answer_tokens(sample, text_of(self.student.tokenizer, ids))
        return words if ids[-1] in self.student.stop_ids else words[:-1]

    @cached_property
    def same_ids(self) -> dict[str, bool]:
        """Of each teacher, whether its tokenizer has the student's ids."""
        return {name: alike or _one_vocabulary(self.student, self.teachers[name].body) for name, alike in self.alike.items()}

    def _part(self, name: str, sample: Sample, student: Encoded, own: Any = None, *, keep: bool = False) -> TeacherPart:
        """A sample as one teacher reads it; of a stored one, only what the visual switch needs. own: if known already."""
        teacher, terms = self.teachers[name], self.terms_of[name]
        switched = bool(student.images) and any(t.switched for t in terms)
        if teacher.stored and not switched:
            return TeacherPart()
        if own is None:
            own = student if self.alike[name] else _encode(name, teacher.body, teacher.view(sample), keep=keep)
        self._check(name, sample, student, own)
        count = self.student.visual_count(student)
        switch = teacher.body.with_visual_count(own, count) if switched else None
        return TeacherPart(None if teacher.stored else teacher.prepared(sample, own), switch)

    def _check(self, name: str, sample: Sample, student: Encoded, own: Encoded) -> None:
        """The compared rows of both towers must be the same tokens, one for one, unless every term compares pieces of text."""
        teacher, terms = self.teachers[name], self.terms_of[name]
        try:
            if all(t.same_tokens for t in terms):
                _check_answers(student, own)
            if any(t.teacher_positions & {"prompt", "text", "all"} and not t.switched for t in terms):
                _check_prompts(student, own, self.student, teacher.body)
        except DataError:
            for role, tower, encoded in (("student", self.student, student), (name, teacher.body, own)):
                refuse_cut(role, tower, sample, encoded)  # the cause, where it is one
            raise
        if any(t.visual_counts_agree for t in terms):
            n_s, n_t = self.student.visual_count(student), teacher.body.visual_count(own)
            if n_s != n_t:
                raise DataError(
                    f"sample {student.id!r} has {n_s} visual tokens in the student and {n_t} in the teacher; terms on visual "
                    "positions (and relation) need equal counts"
                )


def _encode(role: str, tower: Tower, sample: Sample, *, keep: bool) -> Encoded:
    """Raises SampleError that names the tower, ImageError."""
    try:
        return tower.encode(sample, keep=keep)
    except SampleError as error:
        raise SampleError(f"in the {role}: {error}") from error


def refuse_cut(role: str, tower: Tower, sample: Sample, encoded: Encoded) -> None:
    """Raises SampleError for a sample whose answer `max_length` cuts; its rows are not those of another tower."""
    if encoded.truncated:
        raise SampleError(
            f"sample {sample.id!r} has {len(encode_whole(tower, sample).input_ids)} tokens in the {role}, more than "
            f"max_length {tower.max_length}, so {encoded.truncated} of its answer are cut there, not in the other tower; raise "
            "it or shorten the sample"
        )


def encode_whole(tower: Tower, sample: Sample) -> Encoded:
    """A sample as if there were no `max_length`. Raises SampleError, ImageError, DataError."""
    preparer = copy.copy(tower.preparer)
    preparer.max_length = sys.maxsize
    with preparing(sample):
        return preparer.encode(sample)


def _encoded_of(pair: Pair) -> list[Encoded]:
    """What a pair holds of prepared samples, each once."""
    parts = [encoded for part in pair.teachers.values() for encoded in (part.inputs, part.switch) if encoded is not None]
    parts += pair.prompts.values()
    return list({id(encoded): encoded for encoded in (pair.student, *parts)}.values())


def _one_vocabulary(student: Tower, teacher: Tower) -> bool:
    try:
        check_vocabularies(student, teacher)
    except TowerError:
        return False
    return True


def _check_answers(student: Encoded, teacher: Encoded) -> None:
    rows_s, rows_t = student.targets[student.targets >= 0], teacher.targets[teacher.targets >= 0]
    if rows_s.shape != rows_t.shape or not torch.equal(rows_s, rows_t):
        raise DataError(
            f"sample {student.id!r}: the student predicts {len(rows_s)} answer tokens, the teacher {len(rows_t)}, or other "
            "ones; both need the same tokenizer and the same end of turn"
        )


def _check_prompts(student: Encoded, teacher: Encoded, own_tower: Tower, body: Tower) -> None:
    own, other = own_tower.text_ids(student), body.text_ids(teacher)
    if not torch.equal(own, other):
        raise DataError(
            f"sample {student.id!r} has {len(own)} text tokens in the student and {len(other)} in the teacher, or other "
            "ones; terms on prompt positions that compare with the teacher need the same chat template"
        )


@dataclass
class Collator:
    """Pads pairs into a `Batch` and counts what the terms will divide by."""

    student: Tower
    teachers: Mapping[str, Teacher] | Teacher | Tower | None
    instead: Callable[[int], Pair] | None = None  # for the place of a sample in whose batch no other is left

    def __post_init__(self) -> None:
        self.teachers = as_teachers(self.teachers)

    def __call__(self, pairs: Sequence[Pair | Skip]) -> dict[str, Batch]:
        kept = self.kept(pairs)
        student = self.student.collate([p.student for p in kept])
        teachers = {name: self._of_teacher(name, kept, student) for name in kept[0].teachers}
        batch = Batch(student, teachers, torch.zeros(len(COUNTS)))
        batch.counts = counts_of(student, batch.switch)
        batch.facts = {name: [pair.facts[name] for pair in kept] for name in kept[0].facts}
        batch.skipped = [skip for skip in pairs if isinstance(skip, Skip)]
        return {"batch": batch}

    def kept(self, pairs: Sequence[Pair | Skip]) -> list[Pair]:
        """Those that are no skips; where all are, the next sample of the data that can be prepared. Raises DataError."""
        kept = [pair for pair in pairs if isinstance(pair, Pair)]
        if kept:
            return kept
        if self.instead is None:
            raise DataError(f"none of the {len(pairs)} samples of a batch can be used: {in_words(pairs)}")
        return [self.instead(pairs[-1].index)]

    def _of_teacher(self, name: str, pairs: Sequence[Pair], student: TowerInputs) -> TeacherBatch:
        teacher = self.teachers[name]
        parts = [pair.teachers[name] for pair in pairs]
        alike = self._alike(teacher, pairs, parts)
        inputs = student if alike else teacher.collate([part.inputs for part in parts])
        switched = [part.switch for part in parts if part.switch is not None]
        return TeacherBatch(inputs, teacher.body.collate(switched) if switched else None)

    def _alike(self, teacher: Teacher, pairs: Sequence[Pair], parts: Sequence[TeacherPart]) -> bool:
        """Whether one padded batch, and one copy to the device, serves both towers."""
        own, other = self.student, teacher.body
        padding = (own.pad_id, own.image_token_id) == (other.pad_id, other.image_token_id)
        return padding and all(part.inputs is pair.student for pair, part in zip(pairs, parts, strict=True))


def counts_of(student: TowerInputs, switch: TowerInputs | None) -> Tensor:
    """[len(COUNTS)]"""
    counts = {
        "response": int(student.response.sum()),
        "prompt": int(student.prompt.sum()),
        "visual": int(student.visual.sum()),
        "switch": int(switch.response.sum()) if switch is not None else 0,
        "image": sum(student.images),
        "pictured": sum(n > 0 for n in student.images),  # samples with a picture
        "pair": 0,  # a preference stage's collator counts them
        "token": int(student.attention_mask.sum()),  # all but padding
        "sample": len(student.ids),
        "switch_prompt": int(switch.prompt.sum()) if switch is not None else 0,
        "switch_visual": int(switch.visual.sum()) if switch is not None else 0,
        "switch_token": int(switch.attention_mask.sum()) if switch is not None else 0,
        "given": int(student.given.sum()),
        "generated": int(student.generated.sum()),
    }
    return torch.tensor([float(counts[name]) for name in COUNTS])

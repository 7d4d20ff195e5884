"""From raw samples to one batch: student and teachers prepare the SAME samples, each by its own processor."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkd.data.samples import Sample
from mmkd.engine.positions import COUNTS
from mmkd.errors import DataError, ImageError
from mmkd.teachers.live import as_teachers
from mmkd.teachers.teacher import Teacher, same_processor
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.tower import Encoded, Tower, TowerInputs
from mmkd.train.batch import Batch, Pair, TeacherBatch, TeacherPart

logger = logging.getLogger(__name__)


class PairDataset(Dataset):
    """Samples prepared by student and teachers. Prepared samples are kept up to `memory` bytes, so later epochs cost nothing.

    A picture that does not decode gives None, is counted in `skipped` and logged; more than `max_skipped` raise.
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
    ):
        self.samples = samples
        self.student, self.teachers = student, as_teachers(teachers)
        self.alike = {name: same_processor(student, teacher.body) for name, teacher in self.teachers.items()}
        self.terms = terms
        self.terms_of = {name: terms_of_teacher(terms, name, self.teachers) for name in self.teachers}
        for teacher in self.teachers.values():
            teacher.check(samples)
        self.max_skipped = max_skipped
        self._unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # workers tell of theirs
        self.skipped: dict[str, str] = {}
        self.truncated: dict[str, int] = {}  # answer tokens that did not fit, by sample
        self._kept: dict[int, Pair] = {}
        self._pixels: dict[bytes, Tensor] = {}
        self._free = memory // max(1, workers)  # each worker keeps what it prepared

    @property
    def collator(self) -> Collator:
        return Collator(self.student, self.teachers)

    @property
    def skipped_count(self) -> int:
        """Samples with unreadable pictures so far, in this process and its workers."""
        return int(self._unreadable.sum())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair | None:
        pair = self._kept.get(index)
        if pair is None:
            pair = self._prepare(self.samples[index])
            if pair is not None and self._free > 0:
                self._keep(index, pair)
        if pair is None:
            self._skip(index)
        if pair is None or not any(teacher.stored for teacher in self.teachers.values()):
            return pair
        return self._with_stored(index, pair)

    def _with_stored(self, index: int, pair: Pair) -> Pair:
        """The pair with what is on disk of it, which is read anew each time."""
        parts = {
            name: replace(part, inputs=self._of_teacher(name, self.samples[index], pair.student, index))
            if self.teachers[name].stored else part
            for name, part in pair.teachers.items()
        }  # fmt: skip
        return replace(pair, teachers=parts)

    def _of_teacher(self, name: str, sample: Sample, encoded: Encoded, index: int | None = None) -> object:
        return self.teachers[name].prepare(sample, encoded, student=self.student, alike=self.alike[name], index=index)

    def _keep(self, index: int, pair: Pair) -> None:
        """Many questions are about one picture: equal pixels are kept once."""
        for encoded in _encoded_of(pair):
            for name, tensor in encoded.pixels.items():
                digest = hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).digest()
                if digest not in self._pixels:
                    self._pixels[digest] = tensor
                    self._free -= tensor.numel() * tensor.element_size()
                encoded.pixels[name] = self._pixels[digest]
            self._free -= 2 * encoded.input_ids.numel() * encoded.input_ids.element_size()
        self._kept[index] = pair

    def prepare(self, sample: Sample) -> Pair | None:
        """A sample that is none of the set's own; None where its picture cannot be read."""
        pair = self._prepare(sample)
        if pair is None:
            logger.warning("skipped %s: %s", sample.id, self.skipped.pop(sample.id))
        return pair

    def _prepare(self, sample: Sample) -> Pair | None:
        try:
            student = self.student.encode(sample)
            if student.truncated:
                self.truncated[sample.id] = student.truncated
            return Pair(student, {name: self._part(name, sample, student) for name in self.teachers})
        except ImageError as error:
            self.skipped[sample.id] = str(error)
            return None

    def _part(self, name: str, sample: Sample, student: Encoded) -> TeacherPart:
        """A sample as one teacher reads it; of a stored one, only what the visual switch needs."""
        teacher, terms = self.teachers[name], self.terms_of[name]
        switched = bool(student.images) and any(t.switched for t in terms)
        if teacher.stored and not switched:
            return TeacherPart()
        own = student if self.alike[name] else teacher.body.encode(sample)
        self._check(student, own, teacher, terms)
        count = self.student.visual_count(student)
        switch = teacher.body.with_visual_count(own, count) if switched else None
        return TeacherPart(None if teacher.stored else own, switch)

    def _skip(self, index: int) -> None:
        error, seen = self.skipped[self.samples[index].id], bool(self._unreadable[index])
        self._unreadable[index] = True
        if not seen:
            logger.warning("skipped %s (%d so far): %s", self.samples[index].id, self.skipped_count, error)
        if self.skipped_count > self.max_skipped:
            raise DataError(
                f"{self.skipped_count} of {len(self.samples)} training samples have unreadable images, more than the "
                f"{self.max_skipped} that guards.max_skipped_images allows; the last: {error}"
            )

    def _check(self, student: Encoded, own: Encoded, teacher: Teacher, terms: Sequence[Term]) -> None:
        """The compared rows of both towers must be the same tokens, one for one, unless every term compares pieces of text."""
        if all(t.same_tokens for t in terms):
            _check_answers(student, own)
        if any(t.teacher_positions & {"prompt", "text", "all"} and not t.switched for t in terms):
            _check_prompts(student, own, self.student, teacher.body)
        if any(t.visual_counts_agree for t in terms):
            n_s, n_t = self.student.visual_count(student), teacher.body.visual_count(own)
            if n_s != n_t:
                raise DataError(
                    f"sample {student.id!r} has {n_s} visual tokens in the student and {n_t} in the teacher; terms on visual "
                    "positions (and relation) need equal counts"
                )


def _encoded_of(pair: Pair) -> list[Encoded]:
    """What a pair holds of prepared samples, each once."""
    parts = [encoded for part in pair.teachers.values() for encoded in (part.inputs, part.switch) if encoded is not None]
    return list({id(encoded): encoded for encoded in (pair.student, *parts)}.values())


def _check_answers(student: Encoded, teacher: Encoded) -> None:
    rows_s, rows_t = student.targets[student.targets >= 0], teacher.targets[teacher.targets >= 0]
    if rows_s.shape != rows_t.shape or not torch.equal(rows_s, rows_t):
        raise DataError(
            f"sample {student.id!r}: the student predicts {len(rows_s)} answer tokens, the teacher {len(rows_t)}, or other "
            "ones; both need the same tokenizer and the same end of turn, and max_length must hold the answer in both"
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

    def __post_init__(self) -> None:
        self.teachers = as_teachers(self.teachers)

    def __call__(self, pairs: Sequence[Pair | None]) -> dict[str, Batch]:
        kept = [pair for pair in pairs if pair is not None]
        if not kept:
            raise DataError(f"none of the {len(pairs)} images of a batch can be read; see the log for their names")
        student = self.student.collate([p.student for p in kept])
        teachers = {name: self._of_teacher(name, kept, student) for name in kept[0].teachers}
        batch = Batch(student, teachers, torch.zeros(len(COUNTS)))
        batch.counts = counts_of(student, batch.switch)
        return {"batch": batch}

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
    }
    return torch.tensor([float(counts[name]) for name in COUNTS])

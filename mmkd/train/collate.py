"""From raw samples to one batch for both towers: each tower prepares the SAME samples by its own processor."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkd.data.samples import Sample
from mmkd.errors import DataError, ImageError
from mmkd.teachers.ahead import TeacherPass
from mmkd.teachers.store import Said
from mmkd.teachers.stored import CachedTower, Speaker
from mmkd.terms.term import Term
from mmkd.towers.tower import Encoded, Tower, TowerInputs

logger = logging.getLogger(__name__)

# Order of the count vector.
COUNTS = ("response", "prompt", "visual", "switch", "image", "pictured", "token", "pair", "sample",
          "switch_prompt", "switch_visual", "switch_token")  # fmt: skip


@dataclass
class Pair:
    """One sample as both towers prepare it. `switch` is the teacher's with the student's number of visual tokens.

    `said` stands for `teacher` where the teacher is a cache.
    """

    student: Encoded
    teacher: Encoded | None = None
    switch: Encoded | None = None
    said: Said | None = field(default=None, kw_only=True)


@dataclass
class Batch:
    """What the distiller gets. `counts` [len(COUNTS)] are this micro-batch's; the global ones divide the loss.

    Counts stay on the CPU, and a batch on an accelerator keeps the one that it was moved from (`on_host`): which rows a term
    names is asked there, since an answer from the accelerator would have to be waited for.
    """

    student: TowerInputs
    teacher: TowerInputs | None
    switch: TowerInputs | None
    counts: Tensor
    said: Said | None = field(default=None, kw_only=True)  # of a cached teacher, in place of `teacher`
    ahead: TeacherPass | None = field(default=None, kw_only=True, repr=False)  # made before the step, see `Ahead`
    host: Batch | None = field(default=None, kw_only=True, repr=False)

    @property
    def on_host(self) -> Batch:
        return self if self.host is None else self.host

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        def move(x):
            return None if x is None else x.to(device, non_blocking=non_blocking)

        student = move(self.student)
        teacher = student if self.teacher is self.student else move(self.teacher)
        return Batch(student, teacher, move(self.switch), self.counts, said=move(self.said), host=self.on_host)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which `non_blocking` copies are; the data loader calls it."""
        student = _pinned(self.student)
        teacher = student if self.teacher is self.student else _pinned(self.teacher)
        said = None if self.said is None else self.said.pin_memory()
        return replace(self, student=student, teacher=teacher, switch=_pinned(self.switch), said=said)


def _pinned(inputs: TowerInputs | None) -> TowerInputs | None:
    if inputs is None:
        return None
    names = ("input_ids", "attention_mask", "targets", "visual")
    pixels = {name: tensor.pin_memory() for name, tensor in inputs.pixels.items()}
    return replace(inputs, **{name: getattr(inputs, name).pin_memory() for name in names}, pixels=pixels)


class PairDataset(Dataset):
    """Samples prepared by both towers. Prepared samples are kept up to `memory` bytes, so later epochs cost nothing.

    A picture that does not decode gives None, is counted in `skipped` and logged; more than `max_skipped` raise.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        student: Tower,
        teacher: Tower | None,
        terms: Sequence[Term],
        *,
        max_skipped: int = 0,
        memory: int = 2 * 2**30,
        workers: int = 0,
    ):
        self.samples = samples
        self.student, self.teacher = student, teacher
        self.same = teacher is not None and same_processor(student, teacher)
        self.terms = terms
        self.speaker = Speaker(teacher, student, terms) if isinstance(teacher, CachedTower) else None
        if self.speaker is not None:
            self.speaker.check(samples)
        self.max_skipped = max_skipped
        self._unreadable = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # workers tell of theirs
        self.skipped: dict[str, str] = {}
        self.truncated: dict[str, int] = {}  # answer tokens that did not fit, by sample
        self._kept: dict[int, Pair] = {}
        self._pixels: dict[bytes, Tensor] = {}
        self._free = memory // max(1, workers)  # each worker keeps what it prepared

    @property
    def collator(self) -> Collator:
        return Collator(self.student, self.teacher)

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
        if pair is None or self.speaker is None:
            return pair
        return replace(pair, said=self.speaker(index, self.samples[index], pair.student))

    def _keep(self, index: int, pair: Pair) -> None:
        """Many questions are about one picture: equal pixels are kept once."""
        for encoded in {id(e): e for e in (pair.student, pair.teacher, pair.switch) if e is not None}.values():
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
            switched = bool(student.images) and any(t.path == "switch" for t in self.terms)
            if self.teacher is None or (self.speaker is not None and not switched):
                return Pair(student)
            teacher = student if self.same else self.teacher.encode(sample)
        except ImageError as error:
            self.skipped[sample.id] = str(error)
            return None
        self._check(student, teacher)
        switch = self.teacher.with_visual_count(teacher, self.student.visual_count(student)) if switched else None
        return Pair(student, teacher if self.speaker is None else None, switch)

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

    def _check(self, student: Encoded, teacher: Encoded) -> None:
        """The compared rows of both towers must be the same tokens, one for one; `spans` compares other tokens, too."""
        if not any(t.kind == "spans" for t in self.terms):
            self._check_answers(student, teacher)
        if any(t.positions in ("prompt", "text", "all") and t.needs_teacher and t.path == "student" for t in self.terms):
            self._check_prompts(student, teacher)
        if any(t.positions in ("visual", "all") or t.kind == "relation" for t in self.terms):
            n_s, n_t = self.student.visual_count(student), self.teacher.visual_count(teacher)
            if n_s != n_t:
                raise DataError(
                    f"sample {student.id!r} has {n_s} visual tokens in the student and {n_t} in the teacher; terms on visual "
                    "positions (and relation) need equal counts"
                )

    def _check_answers(self, student: Encoded, teacher: Encoded) -> None:
        rows_s, rows_t = student.targets[student.targets >= 0], teacher.targets[teacher.targets >= 0]
        if rows_s.shape != rows_t.shape or not torch.equal(rows_s, rows_t):
            raise DataError(
                f"sample {student.id!r}: the student predicts {len(rows_s)} answer tokens, the teacher {len(rows_t)}, or other "
                "ones; both need the same tokenizer and the same end of turn, and max_length must hold the answer in both"
            )

    def _check_prompts(self, student: Encoded, teacher: Encoded) -> None:
        own, other = self.student.text_ids(student), self.teacher.text_ids(teacher)
        if not torch.equal(own, other):
            raise DataError(
                f"sample {student.id!r} has {len(own)} text tokens in the student and {len(other)} in the teacher, or other "
                "ones; terms on prompt positions that compare with the teacher need the same chat template"
            )


@dataclass
class Collator:
    """Pads pairs into a `Batch` and counts what the terms will divide by."""

    student: Tower
    teacher: Tower | None

    def __call__(self, pairs: Sequence[Pair | None]) -> dict[str, Batch]:
        kept = [pair for pair in pairs if pair is not None]
        if not kept:
            raise DataError(f"none of the {len(pairs)} images of a batch can be read; see the log for their names")
        student = self.student.collate([p.student for p in kept])
        teacher = said = None
        if isinstance(self.teacher, CachedTower):
            said = Said.join([p.said for p in kept])
        elif self.teacher is not None:
            teacher = student if self._alike(kept) else self.teacher.collate([p.teacher for p in kept])
        switched = [p.switch for p in kept if p.switch is not None]
        switch = self.teacher.collate(switched) if switched else None
        return {"batch": Batch(student, teacher, switch, _counts(student, switch), said=said)}

    def _alike(self, pairs: Sequence[Pair]) -> bool:
        """Whether one padded batch, and one copy to the device, serves both towers."""
        padding = (self.student.pad_id, self.student.image_token_id) == (self.teacher.pad_id, self.teacher.image_token_id)
        return padding and all(pair.teacher is pair.student for pair in pairs)


def _counts(student: TowerInputs, switch: TowerInputs | None) -> Tensor:
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


def same_processor(student: Tower, teacher: Tower) -> bool:
    """Whether both towers prepare every sample alike, so that it need be done only once."""
    return student.processor_fingerprint() == teacher.processor_fingerprint()

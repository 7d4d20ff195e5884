"""The student's own answers, mended by the teacher where it would have said something else (SCRG of MGSR)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmkd.answers import Asked
from mmkd.answers.student import StudentAnswers
from mmkd.errors import TowerError, did_you_mean
from mmkd.registry import register
from mmkd.teachers.teacher import Teacher, check_vocabularies, head_of
from mmkd.terms.coupled import head_logits
from mmkd.towers.inputs import Encoded, with_answer_ids
from mmkd.towers.sampling import Sampling, sample
from mmkd.towers.tower import Tower


@register("answers", "mended")
class MendedAnswers(StudentAnswers):
    """The student answers, the teacher changes the token that it most disagrees with, and the student goes on behind it.

    SCRG of MGSR (arXiv 2407.10068): among tokens that are not the teacher's likeliest, the one at which KL(teacher || student) is
    the largest. Our choice: an answer without such a token stays; several corrections are made one after another.
    """

    teacher: str | None = None  # which of several
    corrections: Annotated[int, Field(ge=0, le=64)] = 1

    def needs(self, student: Tower, teachers: Mapping[str, Teacher]) -> list[str]:
        if self.teacher is None and len(teachers) != 1:
            return [f"which of the teachers {', '.join(teachers)} mends the answers? Name it as `teacher`"]
        if self.teacher is not None and self.teacher not in teachers:
            return [f"there is no teacher {self.teacher!r} in this stage; {did_you_mean(self.teacher, teachers)}"]
        found = self._of(teachers)
        if found.tower is None or not (student.has_visual_tokens and found.body.has_visual_tokens):
            return [f"the {found.name} cannot mend answers: it must be a model in this process, and both must have visual tokens"]
        try:
            check_vocabularies(student, found.body)
        except TowerError as error:
            return [str(error)]
        return []

    def _of(self, teachers: Mapping[str, Teacher]) -> Teacher:
        return teachers[self.teacher] if self.teacher is not None else next(iter(teachers.values()))

    def answer_beside(self, student: Tower, teachers: Mapping[str, Teacher], asked: Sequence[Asked]) -> list[list[int]]:
        teacher, answers = self._of(teachers), self.answer(student, asked)
        for turn in range(self.corrections):
            answers = self._mended(student, teacher, asked, answers, turn)
        return answers

    def _mended(
        self, student: Tower, teacher: Teacher, asked: Sequence[Asked], answers: Sequence[list[int]], turn: int
    ) -> list[list[int]]:
        size = min(student.vocabulary, teacher.vocabulary, student.head.weight.shape[0], teacher.head.weight.shape[0])
        own = log_probs(student, [one.prompt for one in asked], answers, size)
        other = log_probs(teacher.tower, [one.theirs[teacher.name] for one in asked], answers, size)
        kept = [mend(ids, p, q) for ids, p, q in zip(answers, other, own, strict=True)]
        open_ = [n for n, ids in enumerate(kept) if ids is not None and ids[-1] not in student.stop_ids]
        open_ = [n for n in open_ if len(kept[n]) < self.max_new_tokens]
        found = [ids if ids is not None else before for ids, before in zip(kept, answers, strict=True)]
        if open_:
            how = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)
            prompts = [(_behind(asked[n].prompt, kept[n]), asked[n].pictures) for n in open_]
            seeds = [asked[n].seed ^ (turn + 1) for n in open_]
            for n, more in zip(open_, sample(student, prompts, seeds, how), strict=True):
                found[n] = [*kept[n], *more][: self.max_new_tokens]
        return found


def _behind(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    """The prompt with tokens that are said already."""
    said = torch.tensor(ids, dtype=prompt.input_ids.dtype)
    none = torch.full((len(ids),), -100, dtype=prompt.targets.dtype)
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, said]), targets=torch.cat([prompt.targets, none]))


@torch.no_grad()
def log_probs(tower: Tower, prompts: Sequence[Encoded], answers: Sequence[Sequence[int]], size: int) -> list[Tensor]:
    """Of each answer its rows over the first `size` tokens, [T, V] each."""
    inputs = tower.collate([with_answer_ids(prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)])
    moved = inputs.to(tower.device)
    hidden = tower.read(moved, tower.see(moved))
    head = head_of(tower)
    return [head_logits(head, rows[where.to(rows.device)], size).log_softmax(-1)
            for rows, where in zip(hidden, inputs.response, strict=True)]  # fmt: skip


def mend(ids: Sequence[int], teacher: Tensor, student: Tensor) -> list[int] | None:
    """The answer up to and with the token that the teacher changes; None where it would have said every one of them.

    teacher, student: log-probabilities at each token [T, V].
    """
    likeliest = teacher.argmax(-1)
    differs = likeliest != torch.tensor(ids, device=likeliest.device)
    if not bool(differs.any()):
        return None
    gap = (teacher.exp() * (teacher - student)).sum(-1).masked_fill(~differs, -torch.inf)
    place = int(gap.argmax())
    return [*ids[:place], int(likeliest[place])]

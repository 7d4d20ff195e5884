"""VQA v2, OK-VQA, TextVQA, VizWiz and ST-VQA: soft accuracy over people's answers, and EvalAI's files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.normalise import normalise_evalai, normalise_vqav2
from mmkd.evaluation.submission import Submission, number, submission
from mmkd.registry import register


def _leave_one_out(matches: int, count: int) -> float:
    """The mean over every reference left out of min(1, matches among the others / 3)."""
    if matches == 0:
        return 0.0
    left_in = min(1.0, (matches - 1) / 3)
    left_out = min(1.0, matches / 3)
    return (matches * left_in + (count - matches) * left_out) / count


def _plain_spaces(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=16_384)
def _vqa_references(references: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
    plain = tuple(_plain_spaces(reference) for reference in references)
    differ = len(set(plain)) > 1
    return differ, tuple(map(normalise_vqav2, plain)) if differ else plain


@register("metrics", "vqa_accuracy")
def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA v2's soft accuracy (GT-Vision-Lab/VQA, `vqaEval.py`): the mean over references left out in turn.

    Quirk kept: when all references are the same string nothing is normalised, so "Yes" is wrong where ten
    people said "yes".  Raises DataError for fewer than four references, with which full marks cannot be had.
    """
    if len(references) < 4:
        raise DataError(
            f"vqa_accuracy needs 4 references or more (VQA v2 has 10), got {len(references)}; "
            "use stvqa_accuracy or exact_match for data with few references"
        )
    differ, normalised = _vqa_references(tuple(references))
    prediction = _plain_spaces(prediction)
    answer = normalise_vqav2(prediction) if differ else prediction
    return _leave_one_out(normalised.count(answer), len(normalised))


@lru_cache(maxsize=16_384)
def _evalai_references(references: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(normalise_evalai, references))


@register("metrics", "textvqa_accuracy")
def textvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """TextVQA's soft accuracy (EvalAI; mmf and LLaVA, `m4c_evaluator.py`). Always normalises, unlike VQA v2.

    Raises DataError when there are not exactly ten references, as the official scorer does.
    """
    if len(references) != 10:
        raise DataError(
            f"textvqa_accuracy needs exactly 10 references, got {len(references)}; "
            "use stvqa_accuracy or exact_match for data with few references"
        )
    return _leave_one_out(_evalai_references(tuple(references)).count(normalise_evalai(prediction)), 10)


@register("metrics", "stvqa_accuracy")
def stvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals any reference after `normalise_evalai` (LLaVA, `m4c_evaluator.py`)."""
    return float(normalise_evalai(prediction) in _evalai_references(tuple(references)))


@submission("vqav2")
class VQAv2(Submission):
    """EvalAI's file for VQA v2 and OK-VQA: answers normalised as LLaVA's converter does."""

    def row(self, prediction: str, question: Question) -> dict[str, Any]:
        return {"question_id": number(question.id), "answer": normalise_evalai(prediction)}


@submission("vizwiz")
class VizWiz(Submission):
    """EvalAI's file for VizWiz: questions go by their picture's name."""

    def row(self, prediction: str, question: Question) -> dict[str, Any]:
        return {"image": question.id, "answer": normalise_evalai(prediction)}


@submission("stvqa")
class STVQA(Submission):
    """The Robust Reading Competition's file for ST-VQA."""

    def row(self, prediction: str, question: Question) -> dict[str, Any]:
        return {"question_id": number(question.id), "answer": prediction.strip()}

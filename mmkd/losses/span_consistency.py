"""Span consistency: neighbouring tokens of one span should go together for the student as they do for the teacher (MGSR).

MGSR (arXiv 2407.10068), span level. It couples each row with the next, so it is no loss of the row engine: callers make the
logits of a few spans at a time. Cut at borders of spans, pieces add up to the whole; neither micro-batches nor ranks change it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.losses.distributions import check_same_shape
from mmkd.losses.numerics import exact, result_dtype

SPAN_FORMS = ("squared", "norm")


@dataclass(frozen=True)
class SpanConsistency:
    """`|q_i ⊙ q_{i+1} - p_i ⊙ p_{i+1}|²` for each row i whose next row is of the same span, else 0.

    p = softmax(teacher), q = softmax(student), ⊙ the product entry by entry; student, teacher: logits `[R, V]` of rows in the
    order of the text; spans `[R]`: a number for each row's span, negative for none; returns `[R]`. `span_pairs(spans)` are the
    rows that count. form "norm" is the distance itself, with gradient 0 where it is 0.

    Source: MGSR as known from reviews: products of neighbouring distributions in spans that a chunker finds, brought together.
    Confirmed there: the product. The L2 distance is assumed, its square is our choice (smooth where both agree), and so are
    spans by number. Raises ValueError for unequal shapes, spans that are not `[R]`, and an unknown form.
    """

    form: str = "squared"

    def __post_init__(self):
        if self.form not in SPAN_FORMS:
            raise ValueError(f"form is {self.form!r}; it must be one of {', '.join(SPAN_FORMS)}")

    def __call__(self, student: Tensor, teacher: Tensor, spans: Tensor) -> Tensor:
        check_same_shape(student, teacher)
        if spans.shape != student.shape[:1]:
            raise ValueError(f"spans have shape {tuple(spans.shape)}; {student.shape[0]} rows need ({student.shape[0]},)")
        first = span_pairs(spans).nonzero().squeeze(-1)  # [P]
        distances = (_products(student, first) - _products(teacher.detach(), first)).square().sum(-1)  # [P]
        if self.form == "norm":
            apart = distances > 0
            distances = distances.where(apart, 1.0).sqrt() * apart
        values = distances.new_zeros(len(spans)).index_put((first,), distances)  # [R]
        return values.to(result_dtype(student, teacher))


def span_pairs(spans: Tensor) -> Tensor:
    """Which rows have the next row in their span: `[R]` bool. spans `[R]`, negative for none."""
    alike = (spans[1:] == spans[:-1]) & (spans[1:] >= 0)  # [R - 1]
    return torch.cat([alike, torch.zeros_like(spans[:1], dtype=torch.bool)])


def _products(logits: Tensor, first: Tensor) -> Tensor:
    """Products of the distributions of rows `first` `[P]` and of those that follow them, `[P, V]`."""
    probabilities = exact(logits).softmax(-1)  # [R, V]
    return probabilities[first] * probabilities[first + 1]

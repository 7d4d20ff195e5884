"""Neighbouring tokens of one span go together for the student as they do for the teacher (MGSR, span level)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from mmkd import losses
from mmkd.errors import TowerError
from mmkd.registry import register
from mmkd.terms.coupled import LogitTerm, both_logits
from mmkd.terms.rows import word_borders, word_numbers
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair


@register("terms", "span_consistency")
@dataclass(frozen=True)
class SpanConsistency(LogitTerm):
    """Distance between the products of neighbouring distributions within a span, of student and teacher.

    A span is a run of answer tokens without white space between them, or a whole answer; the paper's come from a chunker. The
    sum is over pairs of neighbours and is divided by answer tokens. No pair crosses samples: micro-batches and ranks add up.
    """

    origin: ClassVar[str] = "MGSR (arXiv 2407.10068), span level"
    status: ClassVar[str] = "our choice: words or whole answers as spans, squared L2 distance, mean over answer tokens"

    spans: Literal["words", "answer"] = "words"
    form: Literal["squared", "norm"] = "squared"

    def errors(self) -> list[str]:
        return [] if self.positions == "response" else [f"{self.kind} has spans in answers only; use positions: response"]

    def check(self, pair: Pair) -> list[str]:
        try:
            self.prepare(pair)
        except TowerError as error:
            return [f"{error}; or compare whole answers with `spans: answer`"]
        return super().check(pair)

    def prepare(self, pair: Pair) -> Tensor:
        return word_borders(pair.student, self.spans == "words")

    def loss(self, signals: Signals) -> Tensor:
        rows, loss = signals["student.rows"], losses.SpanConsistency(self.form)
        spans = word_numbers(signals.prepared[:, signals.inputs.targets[signals.inputs.response]], rows.samples)  # [R]
        pairs = losses.span_pairs(spans)  # [R]
        kept = (pairs | pad(pairs, (1, 0))[:-1]).nonzero().squeeze(-1)  # rows of pairs
        size, total = max(2, signals.chunk_bytes // (64 * signals.vocabulary)), rows.student.sum() * 0.0
        for part in (kept[a : a + size] for a in range(0, len(kept) - 1, size - 1)):  # one row in common
            pieces = (x[part.to(x.device)] for x in (rows.student, rows.teacher["hidden"], spans.to(signals.device)))
            sums = checkpoint(lambda a, b, ids: loss(*both_logits(signals, a, b), ids).sum(), *pieces, use_reentrant=False)
            total = total + sums
        return total

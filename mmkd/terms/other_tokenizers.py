"""A term for a teacher with another tokenizer: pieces of text are compared instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mmkd.engine.positions import gathered
from mmkd.registry import register
from mmkd.teachers.teacher import Gives
from mmkd.terms.alignment import Alignment, span_losses
from mmkd.terms.signals import Signals
from mmkd.terms.term import Pair, Term


@register("terms", "spans")
@dataclass(frozen=True)
class Spans(Term):
    """Divergence of the two models on aligned spans of text, with sorted probabilities for unmatched tokens (GOLD, ULD)."""

    origin: ClassVar[str] = "GOLD (TRL); ULD (arXiv 2402.12030)"
    status: ClassVar[str] = "our choice: spans by bytes, everything else as one entry"
    needs: ClassVar[tuple[str, ...]] = ("student.hidden", "teacher.hidden")
    count: ClassVar[str] = "response"
    same_tokens: ClassVar[bool] = False

    beta: float = 0.5
    matched_weight: float = -1.0

    def refusal(self, gives: Gives) -> str | None:
        return None if "hidden" in gives.signals else "reads the teacher's own tokens, which are not in a cache"

    def prepare(self, pair: Pair) -> Alignment:
        return Alignment(pair.student, pair.teacher.body)

    def loss(self, signals: Signals) -> Tensor:
        inputs = (signals.inputs, signals.teacher_inputs)
        aligned = signals.prepared.of(inputs[0].targets, inputs[1].targets)
        signals.observe("aligned", aligned.tokens.sum().float(), inputs[0].response.sum())
        hidden = (signals["student.hidden"], signals["teacher.hidden"])
        targets = [x.targets[x.response].to(signals.device, non_blocking=True) for x in inputs]
        return span_losses(
            tuple(gathered(h, x.response) for h, x in zip(hidden, inputs, strict=True)),
            (signals.head, signals.teacher.head),
            signals.prepared.columns,
            tuple(targets),
            aligned,
            signals.prepared.matched,
            signals.chunk_bytes,
            beta=self.beta,
            matched_weight=self.matched_weight,
        )

"""Cross-entropy and divergences between the next-token distributions of student and teacher, on rows of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmkd import losses
from mmkd.registry import register
from mmkd.terms.signals import Signals
from mmkd.terms.term import RowTerm


@register("terms", "cross_entropy")
@dataclass(frozen=True)
class CrossEntropy(RowTerm):
    """Cross-entropy with the tokens of the data: ordinary fine-tuning."""

    origin: ClassVar[str] = "maximum likelihood"
    status: ClassVar[str] = "confirmed"
    teacher_logits: ClassVar[bool] = False
    memory_factor: ClassVar[int] = 2

    label_smoothing: float = 0.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.CrossEntropy(self.label_smoothing)


@register("terms", "forward_kl")
@dataclass(frozen=True)
class ForwardKL(RowTerm):
    """KL(teacher || student), times the square of the temperature."""

    origin: ClassVar[str] = "Hinton et al. (arXiv 1503.02531); LLaVA-KD (arXiv 2410.16236), MDist"
    status: ClassVar[str] = "confirmed"
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.ForwardKL(self.temperature)

    def top_k_loss(self) -> Callable[..., Any] | str:
        if self.temperature != 1:
            return f"temperature {self.temperature} needs all of the teacher's logits"
        return losses.TopKForwardKL()


@register("terms", "reverse_kl")
@dataclass(frozen=True)
class ReverseKL(RowTerm):
    """KL(student || teacher), times the square of the temperature."""

    origin: ClassVar[str] = "MiniLLM (arXiv 2306.08543), token by token as in GKD (arXiv 2306.13649)"
    status: ClassVar[str] = "confirmed"
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.ReverseKL(self.temperature)

    def top_k_loss(self) -> str:
        return f"{self.kind} weighs tokens by the student, whose likely ones need not be among the teacher's: it needs all logits"


@register("terms", "jsd")
@dataclass(frozen=True)
class JSD(RowTerm):
    """Generalised Jensen-Shannon divergence; beta 0 is forward KL, 1 is reverse KL."""

    origin: ClassVar[str] = "GKD (arXiv 2306.13649), D_JSD(beta)"
    status: ClassVar[str] = "confirmed"
    memory_factor: ClassVar[int] = 10

    beta: float = 0.5
    temperature: float = 1.0

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.JSD(self.beta, self.temperature)

    def top_k_loss(self) -> Callable[..., Any] | str:
        if self.temperature != 1 or self.beta == 1:
            return f"{self.kind} with temperature {self.temperature} and beta {self.beta} needs all of the teacher's logits"
        return losses.TopKJSD(self.beta)


@register("terms", "dbild")
@dataclass(frozen=True)
class DBiLD(RowTerm):
    """Switch-KD's divergence between the differences of the largest logits, with the knee as k (DBiLD)."""

    origin: ClassVar[str] = "Switch-KD (arXiv 2604.14629), eq. 7, 14, 15; BiLD (arXiv 2406.13555)"
    status: ClassVar[str] = "our choice: window of the knee, least k, no tau²"
    temperature: float = 3.0
    window: int = 64
    min_k: int = 4
    max_k: int | None = None
    direction: str = "reverse"  # or "forward"
    tau_squared: bool = False
    fixed_k: int | None = None
    inclusive: bool = True

    def row_loss(self, signals: Signals | None = None) -> Callable[..., Any]:
        return losses.DBiLD(
            self.temperature, self.window, self.min_k, self.max_k, self.direction, self.tau_squared, self.fixed_k, self.inclusive
        )

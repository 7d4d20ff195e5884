"""A loss between next-token distributions over two different vocabularies, on spans of text that both tokenise.

Two tokenizers cut the same bytes differently. A *span* is a smallest piece of text at whose ends both have a border: one or
more tokens of each. What both models say about a span is compared as in GOLD (Hugging Face, 2025): entries whose strings are
in both vocabularies by a divergence, the others by their sorted probabilities (ULD, arXiv 2402.12030).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmkd.losses.divergence import check_beta, jsd
from mmkd.losses.numerics import exact, result_dtype

_LEAST = 1e-12  # probability that stands for none, so that logarithms are finite
_ABOVE = -0.9999999  # what log1p is given at least


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """ULD: `Σ_i |p^(i) - q^(i)|` over the i-th largest probabilities, the shorter row padded with zeros.

    student [G, Us], teacher [G, Ut]: probabilities; returns [G]. It is 0 for equal sorted profiles even where the tokens
    differ, which is why it is used only for entries that have no counterpart. Source: ULD, arXiv 2402.12030.
    """
    width = max(student.shape[1], teacher.shape[1])
    profiles = [pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (student, teacher)]
    return (profiles[0] - profiles[1]).abs().sum(-1)


def span_events(log_probs: Tensor, first: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """A model's distribution over what may stand where a span begins.

    log_probs [G, V]: of the span's first position.  first [G]: the token that stands there.  following [G]: log-probability of
    the span's further tokens given those before, 0 where there are none. Returns (probabilities [G, V] of single tokens,
    probability [G] of the span itself); together they sum to 1. The first token keeps what is left of it when the span is taken
    out: it may be continued otherwise. (GOLD multiplies the whole row by the conditionals, which does not sum to 1; this
    proper distribution is our choice. For spans of one token both are the ordinary softmax.)
    """
    probabilities = log_probs.exp()
    of_first = log_probs.gather(1, first[:, None]).squeeze(1)  # [G]
    span = (of_first + following).exp()
    left = (of_first.exp() - span).clamp(min=0)
    return probabilities.scatter(1, first[:, None], left[:, None]), span


def spans(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    matched: Tensor,
    beta: float = 0.5,
    matched_weight: float = -1.0,
) -> Tensor:
    """The loss of each span. [G]

    student, teacher: (probabilities [G, V] of single tokens, probability [G] of the span) as from `span_events`.
    matched [2, M]: the ids, student's and teacher's, of the strings that both vocabularies have.
    beta: of the divergence (`jsd`; 0 forward KL, 1 reverse KL) between the span, the matched strings, and all else together.
    matched_weight: share w of the divergence, 1 - w that of the sorted distance of the unmatched entries; negative: the share of
    the larger vocabulary that is matched. With one tokenizer, w is 1 and the loss is `jsd`. Raises ValueError for w above 1.
    """
    _check_share(matched_weight)
    (own, own_span), (other, other_span) = student, teacher
    dtype = result_dtype(own, other)
    weight = matched_weight if matched_weight >= 0 else matched.shape[1] / max(own.shape[1], other.shape[1])
    own_rest, other_rest = _unmatched(own, matched[0]), _unmatched(other, matched[1])
    value = weight * jsd(_union(own, own_span, matched[0], own_rest), _union(other, other_span, matched[1], other_rest), beta)
    if weight < 1:
        value = value + (1 - weight) * sorted_distance(own_rest, other_rest)
    return value.to(dtype)


def _check_share(weight: float) -> None:
    if weight > 1:
        raise ValueError(f"matched_weight is {weight}; it is a share, at most 1 (negative: the share that is matched)")


def _unmatched(probabilities: Tensor, matched: Tensor) -> Tensor:
    keep = torch.ones(probabilities.shape[1], dtype=torch.bool, device=probabilities.device)
    keep[matched] = False
    return probabilities[:, keep]  # [G, V - M]


def _union(single: Tensor, span: Tensor, matched: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities of the span, each matched string, and everything else. [G, 1 + M + 1]"""
    events = torch.cat([span[:, None], single[:, matched], rest.sum(-1, keepdim=True)], dim=1)
    return exact(events).clamp(min=_LEAST).log()


@dataclass(frozen=True)
class Spans:
    """`spans` with its gradient in closed form and in float32, for rows that are made by millions of numbers.

    beta, matched_weight: as in `spans`.
    """

    beta: float = 0.5
    matched_weight: float = -1.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        _check_share(self.matched_weight)

    def value_and_grad(
        self, student: SpanRows, teacher: SpanRows, matched: Tensor, unmatched: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss of each span [G], its gradient by the student's `probabilities` [G, V], by its `following` [G]).

        matched [2, M], unmatched: ids of both vocabularies, each id in one of the two.
        """
        width = max(student.probabilities.shape[1], teacher.probabilities.shape[1])
        weight = self.matched_weight if self.matched_weight >= 0 else matched.shape[1] / width
        with student.parted() as (own, own_span), teacher.parted() as (other, other_span):
            own_rest, other_rest = own.index_select(1, unmatched[0]), other.index_select(1, unmatched[1])
            values, by_matched = self._divergence(own.index_select(1, matched[0]), other.index_select(1, matched[1]))
        # The span and everything else are two events more.
        own_few = torch.stack([own_span, own_rest.sum(-1)], -1)  # [G, 2]
        few, by_few = self._divergence(own_few, torch.stack([other_span, other_rest.sum(-1)], -1))
        values = weight * (values + few)
        gradient = torch.empty_like(own)  # [G, V]
        gradient.index_copy_(1, matched[0], by_matched.mul_(weight))
        by_rest = (weight * by_few[:, 1:]).expand_as(own_rest)
        if weight < 1:
            distance, signs = _sorted_distance(own_rest, other_rest)
            values = values + (1 - weight) * distance
            by_rest = signs.mul_(1 - weight).add_(by_rest)
        gradient.index_copy_(1, unmatched[0], by_rest)
        return values, *student.unparted(gradient, weight * by_few[:, 0])

    def _divergence(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """A part of `jsd`'s sum, over events of these probabilities [G, K], and its gradient by q [G, K]."""
        beta = self.beta
        q, p = q.clamp(min=_LEAST), p.clamp(min=_LEAST)
        if beta in (0.0, 1.0):
            ratio = (q / p).log_()
            if beta == 1.0:
                return (q * ratio).sum(-1), ratio.add_(1)
            return -(p * ratio).sum(-1), (p / q).neg_()
        mixture = p * beta + q * (1 - beta)
        apart = (p - q).div_(mixture)  # what log(p / m) and log(q / m) follow from, without loss where p and q are close
        of_p = (apart * (1 - beta)).clamp_(min=_ABOVE).log1p_()
        of_q = apart.mul_(-beta).clamp_(min=_ABOVE).log1p_()
        values = beta * (p * of_p).sum(-1) + (1 - beta) * (q * of_q).sum(-1)
        return values, of_q.mul_(1 - beta)


class SpanRows:
    """What one model says where spans begin: probabilities [G, V] of the first position, `first` [G], `following` [G] (see
    `span_events`)."""

    def __init__(self, probabilities: Tensor, first: Tensor, following: Tensor):
        self.probabilities, self.first, self.following = probabilities, first[:, None], following
        self.whole = probabilities.gather(1, self.first).squeeze(1)  # [G]
        self.share = following.exp()

    @contextmanager
    def parted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(probabilities of single tokens, of the span): the same memory, with what the span takes out for the while."""
        span = self.whole * self.share
        self.probabilities.scatter_(1, self.first, (self.whole - span).clamp_(min=0)[:, None])
        yield self.probabilities, span
        self.probabilities.scatter_(1, self.first, self.whole[:, None])

    def unparted(self, gradient: Tensor, by_span: Tensor) -> tuple[Tensor, Tensor]:
        """From gradients by single tokens [G, V] and by the span [G] to those by the probabilities and by `following`."""
        left = gradient.gather(1, self.first).squeeze(1)
        gradient.scatter_(1, self.first, (left + self.share * (by_span - left))[:, None])
        return gradient, self.whole * self.share * (by_span - left)


def _sorted_distance(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`sorted_distance` and its gradient by `own` [G, U]."""
    sorted_own, places = own.sort(-1, descending=True)
    sorted_other = other.sort(-1, descending=True).values
    shared = min(own.shape[1], other.shape[1])
    difference = sorted_own  # the longer one's last entries stand against zeros
    difference[:, :shared] -= sorted_other[:, :shared]
    signs = torch.empty_like(own).scatter_(1, places, difference.sign())
    return difference.abs_().sum(-1) + sorted_other[:, shared:].sum(-1), signs

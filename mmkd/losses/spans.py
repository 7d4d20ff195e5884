"""A loss between next-token distributions over two different vocabularies, on spans of text that both tokenise.

Two tokenizers cut the same bytes differently. A *span* is a smallest piece of text at whose ends both have a border: one or
more tokens of each. What both models say about a span is compared as in GOLD (Hugging Face, 2025): entries whose strings are
in both vocabularies by a divergence, the others by their sorted probabilities (ULD, arXiv 2402.12030).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmkd.losses.divergence import jsd
from mmkd.losses.numerics import exact, result_dtype

_LEAST = 1e-12  # probability that stands for none, so that logarithms are finite


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
    if matched_weight > 1:
        raise ValueError(f"matched_weight is {matched_weight}; it is a share, at most 1 (negative: the share that is matched)")
    (own, own_span), (other, other_span) = student, teacher
    dtype = result_dtype(own, other)
    weight = matched_weight if matched_weight >= 0 else matched.shape[1] / max(own.shape[1], other.shape[1])
    own_rest, other_rest = _unmatched(own, matched[0]), _unmatched(other, matched[1])
    value = weight * jsd(_union(own, own_span, matched[0], own_rest), _union(other, other_span, matched[1], other_rest), beta)
    if weight < 1:
        value = value + (1 - weight) * sorted_distance(own_rest, other_rest)
    return value.to(dtype)


def _unmatched(probabilities: Tensor, matched: Tensor) -> Tensor:
    keep = torch.ones(probabilities.shape[1], dtype=torch.bool, device=probabilities.device)
    keep[matched] = False
    return probabilities[:, keep]  # [G, V - M]


def _union(single: Tensor, span: Tensor, matched: Tensor, rest: Tensor) -> Tensor:
    """Log-probabilities of the span, each matched string, and everything else. [G, 1 + M + 1]"""
    events = torch.cat([span[:, None], single[:, matched], rest.sum(-1, keepdim=True)], dim=1)
    return exact(events).clamp(min=_LEAST).log()

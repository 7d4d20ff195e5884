"""Distributions over different vocabularies: proper ones, equal to the ordinary loss where both vocabularies are one."""

import pytest
import torch

from mmkd.losses import jsd, sorted_distance, span_events, spans

DRAW = torch.Generator().manual_seed(0)


def log_probs(groups: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(groups, vocabulary, generator=DRAW, dtype=torch.float64).log_softmax(-1)


def single(log_p: torch.Tensor, first: torch.Tensor):
    return span_events(log_p, first, torch.zeros(len(first), dtype=log_p.dtype))


def test_events_are_a_distribution():
    log_p, first = log_probs(4, 7), torch.tensor([0, 3, 6, 2])
    following = -torch.rand(4, generator=DRAW, dtype=torch.float64)
    tokens, span = span_events(log_p, first, following)
    torch.testing.assert_close(tokens.sum(-1) + span, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(span, log_p.exp()[torch.arange(4), first] * following.exp())
    assert (tokens >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_one_vocabulary_gives_the_ordinary_divergence(beta):
    own, other, first = log_probs(5, 9), log_probs(5, 9), torch.tensor([1, 8, 0, 4, 4])
    same = torch.arange(9).expand(2, -1)
    value = spans(single(own, first), single(other, first), same, beta=beta)
    torch.testing.assert_close(value, jsd(own, other, beta), rtol=1e-6, atol=1e-9)


def test_order_of_the_vocabularies_does_not_matter():
    own, other, first = log_probs(3, 6), log_probs(3, 8), torch.tensor([0, 1, 5])
    matched = torch.tensor([[0, 1, 2], [3, 4, 7]])
    value = spans(single(own, first), single(other, first + 1), matched)
    order = torch.randperm(8, generator=DRAW)  # the new id of each token of the teacher
    moved = torch.empty_like(other)
    moved[:, order] = other
    again = spans(single(own, first), single(moved, order[first + 1]), torch.stack([matched[0], order[matched[1]]]))
    torch.testing.assert_close(again, value)


def test_sorted_distance_is_uld():
    own, other = torch.tensor([[0.5, 0.2, 0.3]]), torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    assert sorted_distance(own, other).item() == pytest.approx(0.1 + 0.1 + 0.1 + 0.1)
    assert sorted_distance(own, own[:, [2, 0, 1]]).item() == 0.0


def test_unmatched_entries_count_by_their_share():
    own, other, first = log_probs(2, 4), log_probs(2, 4), torch.tensor([0, 0])
    matched = torch.tensor([[0, 1], [0, 1]])
    all_matched = spans(single(own, first), single(other, first), matched, matched_weight=1.0)
    none = spans(single(own, first), single(other, first), matched, matched_weight=0.0)
    torch.testing.assert_close(none, sorted_distance(own.exp()[:, 2:], other.exp()[:, 2:]))
    half = spans(single(own, first), single(other, first), matched)
    torch.testing.assert_close(half, (all_matched + none) / 2)
    with pytest.raises(ValueError, match="at most 1"):
        spans(single(own, first), single(other, first), matched, matched_weight=1.5)


def test_gradient_is_that_of_the_numbers():
    own = log_probs(2, 5).requires_grad_()
    other, first = log_probs(2, 6), torch.tensor([1, 2])
    following = torch.tensor([-0.5, 0.0], dtype=torch.float64)
    matched = torch.tensor([[0, 1, 3], [2, 5, 0]])

    def value(x):
        return spans(span_events(x.log_softmax(-1), first, following), single(other, first), matched, beta=0.4)

    assert torch.autograd.gradcheck(value, (own,))

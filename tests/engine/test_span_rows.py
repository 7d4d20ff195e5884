"""Spans over two vocabularies, walked through once: values and gradients of the plain functions, within the budget."""

import pytest
import torch
from torch.nn.functional import linear

from mmkd.engine.rows import Head
from mmkd.engine.span_rows import Side, _Walk, span_sum
from mmkd.losses.spans import Spans, span_events, spans

MATCHED = torch.tensor([[0, 2, 3, 7, 8], [5, 1, 0, 9, 4]])
# Of the student and of the teacher: spans of one and several tokens, with rows between them that are in none.
BORDERS = (
    torch.tensor([[0, 1], [1, 3], [5, 6], [6, 10]]),
    torch.tensor([[0, 2], [2, 3], [4, 7], [7, 8]]),
)
ROWS = (11, 9)


def sides_of(dtype=torch.float64, scale=1.0, softcap=None, bias=True):
    draw = torch.Generator().manual_seed(0)
    hidden, sides = [], []
    for rows, width, vocabulary, borders in zip(ROWS, (4, 6), (12, 14), BORDERS, strict=True):
        rows_of = 0.3 * torch.randn(rows, width, generator=draw, dtype=torch.float64)  # no event below what logarithms are cut at
        hidden.append(rows_of.to(dtype).requires_grad_())
        weight = torch.randn(vocabulary + 3, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        own = torch.randn(vocabulary + 3, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        targets = torch.randint(0, vocabulary, (rows,), generator=draw)
        sides.append(Side(Head(weight, own, scale, softcap), vocabulary, targets, borders))
    return tuple(hidden), tuple(sides)


def plain(hidden, sides, loss, weights):
    """The same by the functions of `mmkd.losses` in float64."""
    events = []
    for rows, side in zip(hidden, sides, strict=True):
        head, size = side.head, side.vocabulary
        bias = None if head.bias is None else head.bias[:size].double()
        logits = linear(rows.double(), head.weight[:size].double(), bias) * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(1, side.targets[:, None]).squeeze(1)
        following = torch.stack([chosen[a + 1 : b].sum() for a, b in side.borders.tolist()])
        first = side.borders[:, 0]
        events.append(span_events(log_probs[first], side.targets[first], following))
    return (spans(*events, MATCHED, loss.beta, loss.matched_weight) * weights).sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 3.0}, {"scale": 2.0, "bias": False}])
@pytest.mark.parametrize("chunk_bytes", [1, 2000, 2**20])
def test_values_and_gradients_are_those_of_the_functions(beta, options, chunk_bytes):
    loss, weights = Spans(beta), torch.tensor([1, 2, 1, 4])
    found = []
    for way in (span_sum, plain):
        hidden, sides = sides_of(**options)
        given = (hidden, sides, loss, MATCHED, weights, chunk_bytes) if way is span_sum else (hidden, sides, loss, weights)
        value = way(*given)
        (3 * value).backward()
        head = sides[0].head
        found.append((value.detach(), hidden[0].grad, head.weight.grad, *([head.bias.grad] if head.bias is not None else [])))
        if way is span_sum:
            assert hidden[1].grad is None and sides[1].head.weight.grad is None
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_share_of_matched_strings_may_be_set(weight):
    loss, weights = Spans(0.5, weight), torch.ones(4)
    values = []
    for way in (span_sum, plain):
        hidden, sides = sides_of(torch.float32)
        value = way(hidden, sides, loss, MATCHED, weights, 4000) if way is span_sum else way(hidden, sides, loss, weights)
        value.backward()
        values.append((value.detach(), hidden[0].grad))
    for own, other in zip(*values, strict=True):
        torch.testing.assert_close(own.double(), other.double(), rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at most 1"):
        Spans(0.5, 1.5)


def test_a_head_in_half_precision_and_a_frozen_one():
    values = []
    for way in (span_sum, plain):
        hidden, sides = sides_of(torch.bfloat16, bias=False)
        sides[0].head.weight.requires_grad_(False)
        weights = torch.ones(4)
        value = way(hidden, sides, Spans(), MATCHED, weights, 4000) if way is span_sum else way(hidden, sides, Spans(), weights)
        value.backward()
        assert sides[0].head.weight.grad is None and hidden[0].grad.dtype == torch.bfloat16
        values.append((value.detach().double(), hidden[0].grad.double()))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=2e-2, atol=2e-3)


def test_models_that_say_the_same_have_no_loss_and_stay():
    hidden, sides = sides_of(torch.float32)
    same = (sides[0], sides[0])
    everything = torch.arange(12).expand(2, -1)
    value = span_sum((hidden[0], hidden[0].detach().clone()), same, Spans(), everything, torch.ones(4), 4000)
    value.backward()
    assert abs(float(value.detach())) < 1e-6 and float(hidden[0].grad.abs().max()) < 1e-5


def test_chunks_stay_within_the_budget_at_real_sizes():
    """Of 128,000 and 152,000 entries; what one chunk makes at once is counted."""
    sizes = (152_000, 128_000)
    borders = torch.stack([torch.arange(64), torch.arange(1, 65)], 1)
    sides = tuple(Side(Head(torch.zeros(size, 1)), size, torch.zeros(64, dtype=torch.long), borders) for size in sizes)
    matched = torch.arange(100_000).expand(2, -1)
    unmatched = tuple(torch.arange(100_000, size) for size in sizes)
    walk = _Walk(sides, Spans(), matched, unmatched, torch.ones(64), 256 * 2**20)
    pieces = walk.chunks()
    assert pieces[0] == slice(0, 36) and sum(len(range(64)[piece]) for piece in pieces) == 64


def test_no_spans_give_no_loss():
    hidden, sides = sides_of(torch.float32)
    value = span_sum(hidden, sides, Spans(), MATCHED, torch.ones(0), 4000)
    value.backward()
    assert float(value.detach()) == 0.0 and not hidden[0].grad.any()

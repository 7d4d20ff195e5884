"""Span consistency: the catalogue's check, a float64 reference pair by pair, and that spans stand alone."""

import numpy as np
import pytest
import torch

from mmkd.losses import SpanConsistency, span_pairs

BAR = 2e-6
SPANS = torch.tensor([0, 0, 0, -1, -1, 4, 5, 5, -1, 5])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(s, t, spans, form):
    values = np.zeros(len(spans))
    for i in range(len(spans) - 1):
        if spans[i] >= 0 and spans[i] == spans[i + 1]:
            a, b = softmax(s[i]) * softmax(s[i + 1]), softmax(t[i]) * softmax(t[i + 1])
            values[i] = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return values if form == "squared" else np.sqrt(values)


def draw(vocabulary=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(vocabulary)
    return tuple((3 * torch.randn(len(SPANS), vocabulary, generator=generator)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("form", ["squared", "norm"])
@pytest.mark.parametrize("vocabulary", [2, 20, 2000])
def test_float32_against_float64_reference(vocabulary, form):
    s, t = draw(vocabulary, torch.float32)
    found = SpanConsistency(form)(s, t, SPANS)
    assert found.dtype == torch.float32
    expected = reference(s.double().numpy(), t.double().numpy(), SPANS.tolist(), form)
    np.testing.assert_allclose(found.numpy(), expected, rtol=BAR)
    assert (found > 0).tolist() == [True, True, False, False, False, False, True, False, False, False]


def test_pairs():
    assert span_pairs(SPANS).nonzero().squeeze(-1).tolist() == [0, 1, 6]
    assert span_pairs(SPANS[:1]).tolist() == [False] and span_pairs(SPANS[:0]).tolist() == []


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_gradient(form):
    s, t = draw(6)
    assert torch.autograd.gradcheck(lambda x: SpanConsistency(form)(x, t, SPANS), s.requires_grad_())
    (gradient,) = torch.autograd.grad(SpanConsistency(form)(s, t, SPANS).sum(), s)
    assert gradient.any(-1).tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_equal_models_cost_nothing_and_shifts_change_nothing(form):
    s, t = draw()
    leaf = s.clone().requires_grad_()
    values = SpanConsistency(form)(leaf, s, SPANS)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert not values.any() and not gradient.any()
    torch.testing.assert_close(SpanConsistency(form)(s + 5, t - 9, SPANS), SpanConsistency(form)(s, t, SPANS))


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_pieces_cut_at_borders_of_spans_add_up(form):
    s, t = draw()
    pieces = [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    found = torch.cat([SpanConsistency(form)(s[x], t[x], SPANS[x]) for x in pieces])
    torch.testing.assert_close(found, SpanConsistency(form)(s, t, SPANS))


def test_impossible_tokens_and_half_precision():
    s, t = draw()
    s[:, 3], t[:, 4] = -torch.inf, -torch.inf
    leaf = s.clone().requires_grad_()
    values = SpanConsistency()(leaf, t, SPANS)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.isfinite().all() and gradient.isfinite().all()
    half = s.bfloat16(), t.bfloat16()
    assert SpanConsistency()(*half, SPANS).dtype == torch.float32
    torch.testing.assert_close(SpanConsistency()(*half, SPANS), SpanConsistency()(*(x.float() for x in half), SPANS))


def test_errors():
    s, t = draw()
    with pytest.raises(ValueError, match="form is 'l1'.*squared, norm"):
        SpanConsistency("l1")
    with pytest.raises(ValueError, match=r"spans have shape \(4,\); 10 rows need \(10,\)"):
        SpanConsistency()(s, t, SPANS[:4])
    with pytest.raises(ValueError, match=r"\(10, 20\).*\(10, 19\)"):
        SpanConsistency()(s, t[:, :19], SPANS)

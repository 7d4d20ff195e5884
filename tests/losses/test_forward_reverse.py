"""TopKLD, BD-KD and adaptive KL: the catalogue's checks and a float64 reference that walks through one row at a time."""

import math

import pytest
import torch

from mmkd.losses import TopKLD, forward_kl, reverse_kl

BAR = 2e-6


def softmax(z, temperature):
    e = [math.exp((x - max(z)) / temperature) for x in z]
    return [x / sum(e) for x in e]


def mixed(q, p, forward, reverse):
    """Both sums, each entry with its weights."""
    rows = zip(q, p, forward, reverse, strict=True)
    return math.fsum(f * b * math.log(b / a) + r * a * math.log(a / b) for a, b, f, r in rows)


def top_kld(q, p, k, form):
    ranked = sorted(range(len(p)), key=lambda v: -p[v])
    head = [float(v in ranked[:k]) for v in range(len(p))]
    value = mixed(q, p, [1 - x for x in head], head)
    if form == "generalised":
        value += math.fsum((b - a) if h else (a - b) for a, b, h in zip(q, p, head, strict=True))
    return value


def draw(vocabulary, seed=1, rows=6, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype) for _ in range(2))


def compare(loss, s, t, reference):
    found = loss(s, t)
    assert found.dtype == torch.float32
    for value, a, b in zip(found.tolist(), s.tolist(), t.tolist(), strict=True):
        expected = loss.temperature**2 * reference(softmax(a, loss.temperature), softmax(b, loss.temperature))
        assert abs(value - expected) <= BAR * abs(expected)


@pytest.mark.parametrize("form", ["generalised", "plain"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("k", [0, 1, 7, 49, 50])
def test_top_kld_against_the_reference(k, temperature, form):
    s, t = draw(50)
    compare(TopKLD(k, temperature, form), s, t, lambda q, p: top_kld(q, p, k, form))


@pytest.mark.parametrize("form", ["generalised", "plain"])
def test_top_kld_at_its_ends(form):
    s, t = draw(40, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(TopKLD(0, temperature, form)(s, t), forward_kl(s, t, temperature))
        for k in (40, 1000):
            torch.testing.assert_close(TopKLD(k, temperature, form)(s, t), reverse_kl(s, t, temperature))


@pytest.mark.parametrize("form", ["generalised", "plain"])
@pytest.mark.parametrize("k", [0, 1, 10, 40])
def test_top_kld_of_equal_distributions_is_0(k, form):
    s, _ = draw(40, dtype=torch.float64)
    values, gradient = TopKLD(k, form=form).value_and_grad(s, s - 2, None, {})
    assert values.abs().max() < 1e-14
    if form == "generalised" or k in (0, 40):
        assert gradient.abs().max() < 1e-14
    else:  # the plain form takes mass from the head even there
        assert (gradient.gather(-1, s.topk(k).indices) > 0).all() and (gradient.amax(-1) > 0.01).all()


def test_partial_sums_may_be_negative_and_the_generalised_form_is_not():
    p, q = torch.tensor([[0.8, 0.1, 0.1]]).double().log(), torch.tensor([[0.4, 0.3, 0.3]]).double().log()
    head = 0.4 * math.log(0.4 / 0.8)
    tail = 2 * 0.1 * math.log(0.1 / 0.3)
    assert head < 0 and tail < 0
    torch.testing.assert_close(TopKLD(1, form="plain")(q, p), torch.tensor([head + tail]).double())
    for seed in range(20):
        assert (TopKLD(5)(*draw(40, seed, dtype=torch.float64, scale=0.5)) > 0).all()


def test_top_kld_errors():
    with pytest.raises(ValueError, match="k is -1"):
        TopKLD(-1)
    with pytest.raises(ValueError, match="temperature is 0"):
        TopKLD(3, 0)
    with pytest.raises(ValueError, match="form is 'other'.*generalised, plain"):
        TopKLD(form="other")

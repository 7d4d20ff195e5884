"""TopKLD, BD-KD and adaptive KL: the catalogue's checks and a float64 reference that walks through one row at a time."""

import math

import pytest
import torch

from mmkd.losses import BDKD, TopKLD, forward_kl, reverse_kl

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


def bd_kd(q, p, a, b, boost):
    gap = math.fsum(y * math.log(y) for y in q) - math.fsum(y * math.log(y) for y in p)  # H(p) - H(q)
    a, b = a * boost if gap > 0 else a, b * boost if gap < 0 else b
    return mixed(q, p, [a] * len(q), [b] * len(q))


def unlike(rows=6):
    """Students surer than the teacher in the first half of the rows, less sure in the second."""
    s, t = draw(50, rows=rows)
    return s * torch.linspace(2.5, 0.3, rows)[:, None], t


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("a, b, boost", [(1.0, 1.0, 2.0), (1.0, 0.0, 5.0), (0.3, 2.0, 0.0)])
def test_bd_kd_against_the_reference(a, b, boost, temperature):
    compare(BDKD(a, b, boost, temperature), *unlike(), lambda q, p: bd_kd(q, p, a, b, boost))


def test_bd_kd_raises_the_forward_kl_of_sure_students_and_the_reverse_kl_of_others():
    s, t = (x.double() for x in unlike())
    plain, forward = forward_kl(s, t) + reverse_kl(s, t), forward_kl(s, t)
    gained = BDKD(boost=3.0)(s, t) - plain
    sure = torch.special.entr(s.softmax(-1)).sum(-1) < torch.special.entr(t.softmax(-1)).sum(-1)
    assert sure.any() and not sure.all()
    torch.testing.assert_close(gained, 2 * torch.where(sure, forward, plain - forward))


def test_bd_kd_is_the_jeffreys_divergence_and_the_forward_kl():
    s, t = (x.double() for x in unlike())
    jeffreys = BDKD(boost=1.0, temperature=2.0)
    torch.testing.assert_close(jeffreys(s, t), forward_kl(s, t, 2.0) + reverse_kl(s, t, 2.0))
    torch.testing.assert_close(jeffreys(s, t), jeffreys(t, s))
    torch.testing.assert_close(BDKD(1.0, 0.0, 1.0, 2.0)(s, t), forward_kl(s, t, 2.0))
    torch.testing.assert_close(BDKD(0.0, 1.0, 1.0, 2.0)(s, t), reverse_kl(s, t, 2.0))


def test_bd_kd_of_equal_distributions_is_0():
    s, _ = draw(40, dtype=torch.float64)
    values, gradient = BDKD().value_and_grad(s, s - 2, None, {})
    assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_bd_kd_errors():
    for options in (dict(a=-1), dict(b=-1), dict(boost=-0.1), dict(a=0, b=0)):
        with pytest.raises(ValueError, match="none may be negative, and a and b not both 0"):
            BDKD(**options)
    with pytest.raises(ValueError, match="temperature is 0"):
        BDKD(temperature=0)

"""TopKLD, BD-KD and adaptive KL: the catalogue's checks and a float64 reference that walks through one row at a time."""

import math

import pytest
import torch

from mmkd.losses import BDKD, AdaptiveKL, TopKLD, forward_kl, reverse_kl

BAR = 2e-6


def softmax(z, temperature):
    most = max(z)
    e = [math.exp((x - most) / temperature) for x in z]
    total = sum(e)
    return [x / total for x in e]


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


def adaptive_kl(q, p, mu):
    mass, head = 0.0, set()
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= mu:
            break
        mass += p[v]
        head.add(v)
    apart = [abs(a - b) for a, b in zip(q, p, strict=True)]
    forward = math.fsum(apart[v] for v in head) / math.fsum(apart)
    return mixed(q, p, [forward] * len(q), [1 - forward] * len(q))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("mu", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [2, 50, 2000])
def test_adaptive_kl_against_the_reference(vocabulary, mu, temperature):
    compare(AdaptiveKL(mu, temperature), *draw(vocabulary), lambda q, p: adaptive_kl(q, p, mu))


def test_adaptive_kl_at_its_ends():
    s, t = draw(40, dtype=torch.float64)
    torch.testing.assert_close(AdaptiveKL(1.0, 2.0)(s, t), forward_kl(s, t, 2.0))
    torch.testing.assert_close(AdaptiveKL(0.0, 2.0)(s, t), reverse_kl(s, t, 2.0))
    torch.testing.assert_close(AdaptiveKL(1 - 1e-13)(s, t), forward_kl(s, t))
    small = AdaptiveKL(1e-13).weights(s.softmax(-1), t.softmax(-1), t)[0]  # a head of one token: not yet the reverse KL
    assert (small > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_head_is_the_smallest_set_with_the_mass(dtype):
    p = torch.tensor([[0.1, 0.5, 0.05, 0.05, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    q = torch.full_like(p, 0.2)
    # 0.5 is enough at 0.45, 0.5 + 0.3 at 0.55; equal ones stand together; a sure teacher's head is one token
    for mu, heads in ((0.45, [[1], range(5), [0]]), (0.55, [[1, 4], range(5), [0]]), (0.85, [[0, 1, 4], range(5), [0]])):
        forward, reverse = AdaptiveKL(mu).weights(q, p, p)
        apart = (p - q).abs()
        for row, head in enumerate(heads):
            expected = apart[row, list(head)].sum() / apart[row].sum() if row != 1 else torch.tensor(0.5, dtype=dtype)
            torch.testing.assert_close(forward[row, 0], expected)
        torch.testing.assert_close(forward + reverse, torch.ones(3, 1, dtype=dtype))


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_adaptive_kl_of_equal_distributions_is_0(mu):
    s, _ = draw(40, dtype=torch.float64)
    for moved in (s, s - 2):
        values, gradient = AdaptiveKL(mu).value_and_grad(s, moved, None, {})
        assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_adaptive_kl_stops_the_gradient_of_its_weights():
    s, t = draw(40, dtype=torch.float64)
    loss = AdaptiveKL(0.7, 2.0)
    forward, reverse = loss.weights((s / 2).softmax(-1), (t / 2).softmax(-1), t)
    s.requires_grad_()
    fixed = forward[:, 0] * forward_kl(s, t, 2.0) + reverse[:, 0] * reverse_kl(s, t, 2.0)
    found = loss(s, t)
    torch.testing.assert_close(found, fixed)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), s)[0] for x in (found, fixed)))


def test_adaptive_kl_errors():
    for mu in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"mu is {mu}"):
            AdaptiveKL(mu)
    with pytest.raises(ValueError, match="temperature is 0"):
        AdaptiveKL(temperature=0)

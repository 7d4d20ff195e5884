"""DAC-KL: the catalogue's check, a float64 reference, what the band does, and the net that sets it."""

import math

import pytest
import torch

from mmkd.losses import DACKL, DenseBand, forward_kl

BAR = 2e-6


def softmax(z, temperature):
    most = max(z)
    e = [math.exp((x - most) / temperature) for x in z]
    total = math.fsum(e)
    return [x / total for x in e]


def reference(s, t, low, high, softness, temperature):
    """One row: place each token, weigh it, and put what is outside into one bucket."""
    q, p = softmax(s, temperature), softmax(t, temperature)
    value, outside, others = [], [], []
    for v, (a, b) in enumerate(zip(q, p, strict=True)):
        place = math.fsum(x for w, x in enumerate(p) if x < b or (x == b and w < v)) + b / 2
        beyond = max(low - place, place - high, 0.0)
        inside = float(beyond == 0.0) if softness == 0 else max(0.0, 1 - beyond / softness)
        value.append(inside * b * math.log(b / a))
        outside.append((1 - inside) * b)
        others.append((1 - inside) * a)
    rest = math.fsum(outside)
    value.append(rest * math.log(rest / math.fsum(others)) if rest > 1e-15 else 0.0)
    return temperature**2 * math.fsum(value)


def draw(rows=6, vocabulary=40, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    low = 0.4 * torch.rand(rows, generator=generator)
    return s.to(dtype), t.to(dtype), low.to(dtype), (low + 0.1 + 0.5 * torch.rand(rows, generator=generator)).to(dtype)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("softness", [0.0, 0.05, 0.7])
@pytest.mark.parametrize("vocabulary", [5, 40, 700])
def test_float32_against_float64_reference(vocabulary, softness, temperature):
    s, t, low, high = draw(vocabulary=vocabulary, dtype=torch.float32)
    found = DACKL(softness, temperature)(s, t, None, low, high)
    assert found.dtype == torch.float32
    for value, *row in zip(found.tolist(), s.tolist(), t.tolist(), low.tolist(), high.tolist(), strict=True):
        expected = reference(*row, softness, temperature)
        assert abs(value - expected) <= BAR * expected + 1e-12


@pytest.mark.parametrize("softness", [0.0, 0.05])
def test_the_whole_band_is_the_forward_kl_and_none_is_0(softness):
    for dtype in (torch.float32, torch.float64):
        s, t, *_ = draw(dtype=dtype)
        zero, one = torch.zeros(6), torch.ones(6)
        loss = DACKL(softness, 2.0)
        expected, (values, gradient) = forward_kl(s, t, 2.0), loss.value_and_grad(s, t, None, {}, zero, one)
        torch.testing.assert_close(loss(s, t, None, zero, one), expected)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradient, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)))
        values, gradient = DACKL(0.0).value_and_grad(s, t, None, {}, one / 2, one / 2 - 1e-3)
        assert values.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_equal_distributions_cost_nothing_in_any_band():
    s, _, low, high = draw()
    for softness in (0.0, 0.05):
        values, gradient = DACKL(softness).value_and_grad(s, s + 3, None, {}, low, high)
        assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("softness", [0.0, 0.05])
def test_a_wider_band_is_never_less_and_never_above_the_whole_kl(softness):
    s, t, *_ = draw()
    loss, whole = DACKL(softness), forward_kl(s, t)
    ends = [torch.full((6,), x, dtype=torch.float64) for x in torch.linspace(0, 1, 11).tolist()]
    for steps in (zip(ends[::-1], [ends[-1]] * 11, strict=True), zip([ends[0]] * 11, ends, strict=True)):
        values = torch.stack([loss(s, t, None, low, high) for low, high in steps])
        assert (values > -1e-14).all() and (values <= whole + 1e-12).all()
        assert (values.diff(dim=0) > -1e-13).all() and (values[-1] > values[0] + 0.1).any()


def test_a_hard_band_keeps_what_it_says():
    """Tokens with mass 0.1, 0.2, 0.3 and 0.4 stand at 0.05, 0.2, 0.45 and 0.8."""
    p, q = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).double(), torch.tensor([[0.1, 0.4, 0.3, 0.2]]).double()
    found = DACKL(0.0)(q.log(), p.log(), None, torch.tensor([0.1]), torch.tensor([0.5]))
    expected = 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.2) + 0.5 * math.log(0.5 / 0.7)
    assert found.item() == pytest.approx(expected, rel=1e-7)


def test_the_plain_call_carries_a_gradient_to_the_band():
    s, t, low, high = draw(3, 9)
    loss = DACKL(0.5)
    assert torch.autograd.gradcheck(lambda a, b: loss(s, t, None, a, b), (low.requires_grad_(), high.requires_grad_()))
    values = loss(s, t, None, low, high)
    to_low, to_high = torch.autograd.grad(values.sum(), (low, high))
    assert (to_low <= 0).all() and (to_high >= 0).all() and to_low.any() and to_high.any()


def test_dense_band_starts_wide_keeps_its_least_width_and_learns():
    torch.manual_seed(0)
    band = DenseBand(inputs=8, hidden=16, least=0.3).double()
    s, t, *_ = draw(40, 60)
    log_probs = t.log_softmax(-1).topk(8).values
    low, high = band(log_probs)
    assert low.shape == high.shape == (40,) and (high - low > 0.95).all()
    optimizer = torch.optim.Adam(band.parameters(), lr=0.05)
    before = DACKL(0.1)(s, t, None, low, high).sum().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = DACKL(0.1)(s, t, None, *band(log_probs)).sum()
        loss.backward()
        optimizer.step()
    low, high = band(log_probs)
    assert loss.item() < before - 1
    assert ((low >= 0) & (high <= 1) & (high - low >= 0.3)).all()
    assert all(p.grad.abs().sum() > 0 for p in band.parameters())


def test_errors():
    with pytest.raises(ValueError, match=r"softness is -0\.1"):
        DACKL(-0.1)
    with pytest.raises(ValueError, match="temperature is 0"):
        DACKL(temperature=0)
    with pytest.raises(ValueError, match="least is 2"):
        DenseBand(least=2)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        DACKL()(torch.zeros(2, 3), torch.zeros(2, 4), None, torch.zeros(2), torch.ones(2))

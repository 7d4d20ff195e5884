"""Swing: the catalogue's checks, a float64 reference, and its noise."""

import math

import pytest
import torch

from mmkd.losses import Swing, forward_kl
from mmkd.losses.swing import gaussian

BAR = 2e-6
SCORES = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]


def softmax(z, temperature):
    most = max(z)
    e = [math.exp((x - most) / temperature) for x in z]
    total = math.fsum(e)
    return [x / total for x in e]


def reference(s, t, score, loss, xi):
    """One row, by the definition."""
    tau = loss.tau_min + (loss.tau_max - loss.tau_min) * score
    p = softmax([z + loss.noise * score * n for z, n in zip(t, xi, strict=True)], tau)
    q = softmax(s, tau)
    return tau**2 * math.fsum(b * math.log(b / a) for a, b in zip(q, p, strict=True))


def draw(vocabulary=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(vocabulary)
    s, t = ((3 * torch.randn(6, vocabulary, generator=generator)).to(dtype) for _ in range(2))
    return s, t, torch.tensor(SCORES, dtype=dtype), torch.arange(6) * 1000 + 7


@pytest.mark.parametrize("loss", [Swing(), Swing(0.5, 20.0), Swing(2.0, 2.0), Swing(1.0, 3.0, 0.7)], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 40, 3000])
def test_float32_against_float64_reference(vocabulary, loss):
    s, t, score, seed = draw(vocabulary, torch.float32)
    found, xi = loss(s, t, None, score, seed), gaussian(seed, vocabulary)
    assert found.dtype == torch.float32
    for value, *row in zip(found.tolist(), s.tolist(), t.tolist(), SCORES, xi.tolist(), strict=True):
        expected = reference(*row[:2], torch.tensor(row[2]).item(), loss, row[3])
        assert abs(value - expected) <= BAR * expected


def test_no_score_and_no_noise_is_the_forward_kl_at_tau_min():
    s, t, score, seed = draw()
    nothing = torch.zeros_like(score)
    for loss in (Swing(2.0, 9.0), Swing(2.0, 9.0, noise=5.0)):  # the noise is scaled by the score
        torch.testing.assert_close(loss(s, t, None, nothing, seed), forward_kl(s, t, 2.0))
        gradient = loss.value_and_grad(s, t, None, {}, nothing, seed)[1]
        torch.testing.assert_close(gradient, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)))
    same = Swing(3.0, 3.0)
    torch.testing.assert_close(same(s, t, None, score), forward_kl(s, t, 3.0))


def test_a_private_token_and_a_high_temperature_make_the_target_even():
    s, t, score, _ = draw()
    tau = 1e6
    gradient = Swing(1.0, tau).value_and_grad(torch.zeros_like(s), t, None, {}, score)[1] / (1 + (tau - 1) * score[:, None])
    target = 1 / 40 - gradient  # q - p, of an even student
    torch.testing.assert_close(target[0], t[0].softmax(-1))
    assert (target[-1] - 1 / 40).abs().max() < 1e-6
    uneven = (target - 1 / 40).abs().amax(-1)
    assert (uneven.diff() < 0).all()


def test_equal_models_cost_nothing_without_noise():
    s, _, score, seed = draw()
    values, gradient = Swing().value_and_grad(s, s + 2, None, {}, score)
    assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    noisy = Swing(noise=1.0)(s, s, None, score, seed)
    assert noisy[0].abs() < 1e-14 and (noisy[1:] > 1e-3).all()


def test_noise_is_standard_normal_and_of_its_seed_and_column_alone():
    seed = torch.cat([torch.arange(100), torch.arange(100) << 32, torch.tensor([-1, 2**62 + 12345])])
    xi = gaussian(seed, 5000).double()
    assert abs(xi.mean()) < 0.005 and abs(xi.std() - 1) < 0.005
    assert abs((xi**3).mean()) < 0.02 and abs((xi**4).mean() - 3) < 0.05
    assert xi.isfinite().all() and 4 < xi.abs().max() < 6
    for shift in (1, 2, 64):  # neither neighbours in a row nor neighbouring seeds go together
        assert abs((xi[:, shift:] * xi[:, :-shift]).mean()) < 0.01
        assert abs((xi[shift:] * xi[:-shift]).mean()) < 0.01
    assert len(xi[:, 0].unique()) > 195
    assert torch.equal(gaussian(seed[[7, 3]], 300).double(), xi[[7, 3], :300])


def test_noise_differs_by_seed_and_repeats():
    s, t, score, seed = draw()
    loss = Swing(noise=1.0)
    first = loss(s, t, None, score, seed)
    assert torch.equal(first, loss(s, t, None, score, seed))
    assert (first != loss(s, t, None, score, seed + 1))[1:].all()


def test_errors():
    for options in (dict(tau_min=0), dict(tau_min=3, tau_max=2)):
        with pytest.raises(ValueError, match="0 < tau_min <= tau_max"):
            Swing(**options)
    with pytest.raises(ValueError, match="noise is -1"):
        Swing(noise=-1)
    s, t, score, _ = draw()
    with pytest.raises(ValueError, match=r"noise is 0\.5, but the rows have no seeds"):
        Swing(noise=0.5)(s, t, None, score)
    with pytest.raises(ValueError, match=r"\(6, 40\).*\(6, 39\)"):
        Swing()(s, t[:, :39], None, score)

"""PWCE: the catalogue's checks and a float64 reference over a whole step."""

import math

import numpy as np
import pytest
import torch

from mmkd.losses import PWCE, cross_entropy, log_mean_perplexity

BAR = 2e-6


def reference(s, targets, loss):
    """All rows of a step: perplexities, weights with their mean taken in full, values."""
    ce = np.array([math.log(math.fsum(np.exp(z - z.max()))) + z.max() - z[n] for z, n in zip(s, targets, strict=True)])
    ppl = np.exp(ce)
    raised = 1 + loss.a * ppl / (ppl.mean() + loss.epsilon)
    w = raised / raised.mean()
    return w, ce * (1 + loss.lam * w)


def draw(rows=12, vocabulary=30, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(vocabulary)
    s = (scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    return s, torch.randint(0, vocabulary, (rows,), generator=generator)


def log_mean(s, targets):
    return log_mean_perplexity(cross_entropy(s.double(), targets)).expand(len(targets))


@pytest.mark.parametrize("loss", [PWCE(), PWCE(0.2, 3.0), PWCE(5.0, 0.1, epsilon=2.0), PWCE(lam=0.0)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 2.0, 6.0])
@pytest.mark.parametrize("vocabulary", [2, 30, 3000])
def test_float32_against_float64_reference(vocabulary, scale, loss):
    s, targets = draw(vocabulary=vocabulary, dtype=torch.float32, scale=scale)
    found = loss(s, None, targets, log_mean(s, targets))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), reference(s.double().numpy(), targets.tolist(), loss)[1], rtol=BAR)


@pytest.mark.parametrize("loss", [PWCE(), PWCE(0.3), PWCE(10.0, epsilon=1.0), PWCE(0.0)], ids=str)
def test_the_mean_weight_is_1(loss):
    s, targets = draw(50)
    w = loss.weights(cross_entropy(s, targets), log_mean(s, targets))
    assert w.mean().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(w.numpy(), reference(s.numpy(), targets.tolist(), loss)[0], rtol=1e-10)


def test_hard_tokens_weigh_more():
    s, targets = draw()
    ce = cross_entropy(s, targets)
    w = PWCE().weights(ce, log_mean(s, targets))
    assert torch.equal(w.argsort(), ce.argsort()) and w.max() > 1.5 > 0.6 > w.min() >= 0.5


def test_a_0_is_the_cross_entropy_1_plus_lam_times():
    s, targets = draw()
    torch.testing.assert_close(PWCE(0.0, 0.7)(s, None, targets, log_mean(s, targets)), 1.7 * cross_entropy(s, targets))
    torch.testing.assert_close(PWCE(3.0, 0.0)(s, None, targets, log_mean(s, targets)), cross_entropy(s, targets))


def test_equal_perplexities_weigh_1():
    s, targets = draw(1)
    s, targets = s.expand(7, -1), targets.expand(7)
    w = PWCE(4.0).weights(cross_entropy(s, targets), log_mean(s, targets))
    torch.testing.assert_close(w, torch.ones(7, dtype=torch.float64))


def test_no_gradient_flows_through_the_weights():
    s, targets = draw()
    mean, leaf = log_mean(s, targets), s.clone().requires_grad_()
    w = PWCE().weights(cross_entropy(s, targets), mean)
    found, fixed = PWCE(lam=0.5)(leaf, None, targets, mean), cross_entropy(leaf, targets) * (1 + 0.5 * w)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf)[0] for x in (found, fixed)))


def test_mean_perplexity_over_ranks():
    ce = cross_entropy(*draw(20))
    whole = log_mean_perplexity(ce)
    assert whole.item() == pytest.approx(math.log(np.exp(ce.numpy()).mean()), rel=1e-12)
    parts = torch.stack([part.logsumexp(0) for part in (ce[:3], ce[3:15], ce[15:])])
    torch.testing.assert_close(parts.logsumexp(0) - math.log(20), whole)


def test_perplexities_too_large_for_a_float_still_have_a_weight():
    s = torch.zeros(2, 3)
    s[0, 0], s[1, 1] = 900.0, 1.0
    targets = torch.tensor([2, 1])
    w = PWCE().weights(cross_entropy(s, targets), log_mean(s, targets))
    torch.testing.assert_close(w, torch.tensor([1.5, 0.5], dtype=torch.float64))
    values, gradient = PWCE().value_and_grad(s, None, targets, {}, log_mean(s, targets))
    assert values.isfinite().all() and gradient.isfinite().all()


def test_errors():
    for options in (dict(a=-1), dict(lam=-0.1), dict(epsilon=-1e-9)):
        with pytest.raises(ValueError, match="none may be negative"):
            PWCE(**options)

"""Skew KL and skew reverse KL: the catalogue's checks, a float64 reference, the bound."""

import math

import numpy as np
import pytest
import torch

from mmkd.losses import SkewKL, SkewReverseKL, forward_kl, reverse_kl

BAR = 2e-6


def probabilities(z, temperature):
    e = np.exp(z / temperature - (z / temperature).max())
    return e / e.sum()


def reference(s, t, lam, temperature, reverse):
    """One row, by the definition."""
    q, p = probabilities(s, temperature), probabilities(t, temperature)
    total = 0.0
    for a, b in zip(q, p, strict=True):
        total += a * math.log(a / ((1 - lam) * b + lam * a)) if reverse else b * math.log(b / (lam * b + (1 - lam) * a))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("lam", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("vocabulary", [2, 30, 3000])
@pytest.mark.parametrize("kind", [SkewKL, SkewReverseKL])
def test_float32_against_float64_reference(kind, vocabulary, lam, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    s, t = (3 * torch.randn(8, vocabulary, generator=generator) for _ in range(2))
    found = kind(lam, temperature)(s, t)
    assert found.dtype == torch.float32
    for value, a, b in zip(found.double(), s.double().numpy(), t.double().numpy(), strict=True):
        expected = reference(a, b, lam, temperature, kind is SkewReverseKL)
        assert abs(value - expected) <= BAR * expected


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))


def test_lam_0_is_the_plain_kl():
    s, t = rows()
    assert torch.equal(SkewKL(0.0, 2.0)(s, t), forward_kl(s, t, 2.0))
    assert torch.equal(SkewReverseKL(0.0, 2.0)(s, t), reverse_kl(s, t, 2.0))
    torch.testing.assert_close(SkewKL(1e-13)(s, t), forward_kl(s, t), rtol=1e-6, atol=0)
    torch.testing.assert_close(SkewReverseKL(1e-13)(s, t), reverse_kl(s, t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [SkewKL, SkewReverseKL])
def test_lam_1_gives_0_and_trains_nothing(kind):
    s, t = rows()
    assert (kind(1 - 1e-9)(s, t).abs() < 1e-8).all()
    with pytest.raises(ValueError, match=r"lam is 1\.0.*\[0, 1\)"):
        kind(1.0)


@pytest.mark.parametrize("kind", [SkewKL, SkewReverseKL])
def test_equal_distributions_cost_nothing(kind):
    s, _ = rows()
    values, gradient = kind(0.2).value_and_grad(s, s + 4, None, {})
    assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_the_two_are_mirror_images():
    s, t = rows()
    torch.testing.assert_close(SkewKL(0.3)(s, t), SkewReverseKL(0.3)(t, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [SkewKL, SkewReverseKL])
def test_never_above_the_bound_even_where_the_other_distribution_has_nothing(kind, dtype):
    s, t = torch.full((1, 6), -400.0, dtype=dtype), torch.full((1, 6), -400.0, dtype=dtype)
    s[0, 0], t[0, 5] = 0.0, 0.0
    values, gradient = kind(0.1).value_and_grad(s, t, None, {})
    torch.testing.assert_close(values, torch.tensor([-math.log(0.1)], dtype=dtype))
    assert (forward_kl(s, t) > 300).all() and gradient.abs().max() <= 1
    s, t = s.masked_fill(s < 0, -math.inf), t.masked_fill(t < 0, -math.inf)
    torch.testing.assert_close(kind(0.1)(s, t), torch.tensor([-math.log(0.1)], dtype=dtype))


def test_errors():
    for kind in (SkewKL, SkewReverseKL):
        with pytest.raises(ValueError, match=r"lam is -0\.1"):
            kind(-0.1)
        with pytest.raises(ValueError, match="temperature is 0"):
            kind(temperature=0)
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            kind()(torch.zeros(2, 3), torch.zeros(2, 4))

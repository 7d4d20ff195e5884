"""Feature matching: formulas, gradients, invariances."""

import pytest
import torch

from mmkd import losses
from mmkd.losses import feature_match

F64 = torch.float64


def pair(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 33, generator=generator, dtype=F64).to(dtype) for _ in range(2)]


def reference(s, t, kind):
    s, t = s.double(), t.double()
    if kind == "cosine":
        return 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    d = (s - t).abs()
    return (d**2).mean(-1) if kind == "mse" else torch.where(d < 1, d**2 / 2, d - 0.5).mean(-1)


@pytest.mark.parametrize("kind", ["cosine", "mse", "smooth_l1"])
def test_value_and_gradient(kind):
    s, t = pair(torch.float32)
    torch.testing.assert_close(feature_match(s, t, kind).double(), reference(s, t, kind), rtol=2e-6, atol=0)
    s, t = pair()
    assert torch.autograd.gradcheck(lambda x: feature_match(x, t, kind), s.requires_grad_())


def test_cosine_ignores_scale_and_zero_rows_are_finite():
    s, t = pair()
    torch.testing.assert_close(feature_match(5 * s, t), feature_match(s, t))
    assert not torch.allclose(feature_match(5 * s, t, "mse"), feature_match(s, t, "mse"))
    zero = torch.zeros(6, 33, requires_grad=True)
    feature_match(zero, t.float()).sum().backward()
    assert zero.grad.isfinite().all()


def test_errors():
    s, t = pair()
    with pytest.raises(ValueError, match="'l3'"):
        feature_match(s, t, "l3")
    with pytest.raises(ValueError, match="project"):
        feature_match(s, t[:, :4])


def test_tags_is_the_sum_of_binary_cross_entropies():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=generator, dtype=torch.float64).mul_(4).requires_grad_()
    present = torch.rand(5, 40, generator=generator) < 0.2
    p = torch.sigmoid(logits)
    expected = -(torch.where(present, p.log(), (1 - p).log())).sum(-1)
    torch.testing.assert_close(losses.tags(logits, present), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.tags(logits.float(), present).double(), expected, rtol=2e-6, atol=0)
    (gradient,) = torch.autograd.grad(losses.tags(logits, present).sum(), logits)
    torch.testing.assert_close(gradient, p - present.double(), rtol=1e-10, atol=1e-12)

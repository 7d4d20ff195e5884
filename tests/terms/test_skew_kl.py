"""Skew KL as a term."""

import pytest
import torch
from objectives import assert_equals, assert_micro_batches_add_up, assert_refused_by_top_k, assert_refused_options, term


def reference(lam, temperature):
    def mean(zs, zt, targets):
        q, p = (zs / temperature).softmax(-1), (zt / temperature).softmax(-1)
        return temperature**2 * (p * (p / (lam * p + (1 - lam) * q)).log()).sum(-1).mean()

    return mean


@pytest.mark.parametrize(("lam", "temperature"), [(0.1, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_it_equals_a_plain_computation(tmp_path, lam, temperature):
    assert_equals(tmp_path, term("skew_kl", lam=lam, temperature=temperature), reference(lam, temperature))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("skew_kl"))


def test_it_stays_below_its_bound():
    far = 80.0 * torch.eye(4, dtype=torch.float64)
    values = term("skew_kl").row_loss()(far, far.flip(0), None)
    assert values.max() <= -torch.tensor(0.1).log() and values.min() > 2.3


def test_what_it_refuses():
    assert_refused_by_top_k(term("skew_kl"), "skew_kl: skew_kl needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("skew_kl", "lam is 1.0; it must lie in", lam=1.0)

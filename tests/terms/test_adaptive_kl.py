"""Adaptive KL as a term."""

import pytest
import torch
from objectives import assert_equals, assert_micro_batches_add_up, assert_refused_by_top_k, assert_refused_options, term


def reference(mu, temperature):
    """Head and tail by a sort of each row."""

    def mean(zs, zt, targets):
        q, p = (zs / temperature).softmax(-1), (zt / temperature).softmax(-1)
        ordered, ids = p.sort(-1, descending=True)
        head = torch.zeros_like(p).scatter(-1, ids, (ordered.cumsum(-1) - ordered < mu).double())
        apart = (p - q).abs().detach()
        g_head, g_tail = (apart * head).sum(-1), (apart * (1 - head)).sum(-1)
        forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
        return temperature**2 * ((g_head * forward + g_tail * reverse) / (g_head + g_tail)).mean()

    return mean


@pytest.mark.parametrize(("mu", "temperature"), [(0.5, 1.0), (0.8, 2.0)])
def test_it_equals_a_plain_computation(tmp_path, mu, temperature):
    assert_equals(tmp_path, term("adaptive_kl", mu=mu, temperature=temperature), reference(mu, temperature))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("adaptive_kl"))


def test_what_it_refuses():
    assert_refused_by_top_k(term("adaptive_kl"), "adaptive_kl needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("adaptive_kl", "mu is 1.5; it must lie in", mu=1.5)

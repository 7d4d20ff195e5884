"""PLD as a term."""

import pytest
import torch
from objectives import assert_equals, assert_micro_batches_add_up, assert_refused_by_top_k, assert_refused_options, term


def reference(k, temperature):
    """Rank by rank: the label, then the teacher's order; what is ranked before leaves the normaliser."""

    def mean(zs, zt, targets):
        rows = []
        for z, t, label in zip(zs, zt, targets.tolist(), strict=True):
            order = [label, *(v for v in t.argsort(descending=True).tolist() if v != label)]
            alpha = (t / temperature).softmax(-1)
            rows.append(sum(alpha[v] * (z[order[r:]].logsumexp(-1) - z[v]) for r, v in enumerate(order[: k + 1])))
        return torch.stack(rows).mean()

    return mean


@pytest.mark.parametrize(("k", "temperature"), [(8, 1.0), (64, 2.0), (1000, 1.0)])
def test_it_equals_a_plain_computation(tmp_path, k, temperature):
    assert_equals(tmp_path, term("pld", k=k, temperature=temperature), reference(k, temperature))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("pld"))


def test_what_it_refuses():
    assert_refused_by_top_k(term("pld"), "pld needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("pld", "k is 0; it must be at least 1", k=0)
    assert_refused_options("pld", "pld has no target at positions: visual", positions="visual")

"""TopKLD as a term."""

import pytest
import torch
from objectives import assert_equals, assert_micro_batches_add_up, assert_refused_by_top_k, assert_refused_options, term


def reference(k, form):
    def mean(zs, zt, targets):
        q, p = zs.softmax(-1), zt.softmax(-1)
        top = torch.zeros_like(p, dtype=torch.bool).scatter(-1, zt.topk(k).indices, True)
        reverse, forward = q * (q / p).log(), p * (p / q).log()
        if form == "generalised":
            reverse, forward = reverse - q + p, forward - p + q
        return torch.where(top, reverse, forward).sum(-1).mean()

    return mean


@pytest.mark.parametrize(("k", "form"), [(5, "generalised"), (50, "plain"), (0, "generalised")])
def test_it_equals_a_plain_computation(tmp_path, k, form):
    assert_equals(tmp_path, term("topkld", k=k, form=form), reference(k, form))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("topkld"))


def test_what_it_refuses():
    assert_refused_by_top_k(term("topkld"), "topkld needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("topkld", "k is -1; it must be at least 0", k=-1)
    assert_refused_options("topkld", "form is 'other'", form="other")

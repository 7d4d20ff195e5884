"""BD-KD as a term."""

import pytest
import torch
from objectives import assert_equals, assert_micro_batches_add_up, assert_refused_by_top_k, assert_refused_options, term


def reference(a, b, boost):
    def mean(zs, zt, targets):
        q, p = zs.softmax(-1), zt.softmax(-1)
        own, other = -(q * q.log()).sum(-1), -(p * p.log()).sum(-1)
        rows = []
        for i, (surer, less) in enumerate(zip(own < other, own > other, strict=True)):
            forward, reverse = (p[i] * (p[i] / q[i]).log()).sum(), (q[i] * (q[i] / p[i]).log()).sum()
            rows.append(a * (boost if surer else 1) * forward + b * (boost if less else 1) * reverse)
        return torch.stack(rows).mean()

    return mean


@pytest.mark.parametrize(("a", "b", "boost"), [(1.0, 1.0, 2.0), (0.5, 2.0, 3.0), (1.0, 0.0, 1.0)])
def test_it_equals_a_plain_computation(tmp_path, a, b, boost):
    assert_equals(tmp_path, term("bd_kd", a=a, b=b, boost=boost), reference(a, b, boost))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("bd_kd"))


def test_what_it_refuses():
    assert_refused_by_top_k(term("bd_kd"), "bd_kd needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("bd_kd", "none may be negative", b=-1.0)

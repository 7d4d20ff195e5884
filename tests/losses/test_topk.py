"""Forward KL on the k likeliest tokens and a bucket of the others."""

import pytest
import torch

from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.losses import forward_kl, jsd
from mmkd.losses.topk import TopKForwardKL, top_k_forward_kl, top_k_jsd

R, V, K = 7, 50, 6


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(R, V, generator=g, dtype=torch.float64) for _ in range(2))
    top = teacher.log_softmax(-1).topk(K, -1)
    tail = (1 - top.values.exp().sum(-1)).log()
    return student.requires_grad_(), teacher, top.indices, top.values, tail


def bucketed(logits, ids):
    """Probabilities of the k tokens and of the rest, [R, k + 1], by plain sums."""
    p = logits.softmax(-1)
    kept = p.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def test_it_is_the_kl_of_the_bucketed_distributions():
    student, teacher, ids, log_probs, tail = case()
    p, q = bucketed(teacher, ids), bucketed(student, ids)
    expected = (p * (p.log() - q.log())).sum(-1)
    found = top_k_forward_kl(student, ids, log_probs, tail)
    torch.testing.assert_close(found, expected)
    assert (found <= forward_kl(student, teacher) + 1e-12).all() and (found < forward_kl(student, teacher)).any()


def test_it_is_the_whole_kl_where_the_rests_have_one_shape():
    student, teacher, ids, log_probs, tail = case(1)
    alike = teacher.clone()
    alike.scatter_(-1, ids, student.detach().gather(-1, ids))  # differs from the teacher on the k tokens alone
    torch.testing.assert_close(top_k_forward_kl(alike, ids, log_probs, tail), forward_kl(alike, teacher))


def test_closed_gradient_equals_autograd():
    student, _, ids, log_probs, tail = case(2)
    values = top_k_forward_kl(student, ids, log_probs, tail)
    (expected,) = torch.autograd.grad(values.sum(), student)
    found, gradient = TopKForwardKL().value_and_grad(student.detach(), None, None, {}, ids, log_probs, tail)
    torch.testing.assert_close(found, values.detach())
    torch.testing.assert_close(gradient, expected)


def test_a_student_that_has_no_rest_left_gives_finite_numbers():
    student = torch.full((1, V), -200.0)
    student[0, :K] = 200.0
    ids = torch.arange(K)[None]
    log_probs, tail = torch.full((1, K), 0.9 / K).log(), torch.tensor([0.1]).log()
    values, gradient = TopKForwardKL().value_and_grad(student, None, None, {}, ids, log_probs, tail)
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all() and values > 30


def test_in_the_row_engine_each_row_meets_its_own_tokens():
    """Chunks of a row or two and rows that the term leaves out: extra tensors stay with their rows."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(R, 8, generator=g, dtype=torch.float64), torch.randn(V, 8, generator=g, dtype=torch.float64)
    _, _, ids, log_probs, tail = case(3)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    term = RowTerm("kl", 1.0, TopKForwardKL(), False, mask, extra=(ids, log_probs, tail))
    hidden.requires_grad_()
    total, sums = row_losses(hidden, Head(weight), torch.zeros(R, dtype=torch.long), [term], chunk_bytes=V * 8 * 4)
    (found,) = torch.autograd.grad(total, hidden)
    expected = top_k_forward_kl(hidden @ weight.T, ids, log_probs, tail)[mask].sum()
    torch.testing.assert_close(sums["kl"], expected.detach())
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden)[0])


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_that_of_the_bucketed_distributions(beta):
    student, teacher, ids, log_probs, tail = case(3)
    p, q = bucketed(teacher, ids), bucketed(student, ids)
    middle = beta * p + (1 - beta) * q
    expected = (beta * p * (p / middle).log() + (1 - beta) * q * (q / middle).log()).sum(-1)
    found = top_k_jsd(student, ids, log_probs, tail, beta)
    torch.testing.assert_close(found, expected)
    assert (found <= jsd(student, teacher, beta) + 1e-12).all() and (found > 0).all()
    assert torch.autograd.gradcheck(lambda x: top_k_jsd(x, ids, log_probs, tail, beta), student)


def test_the_ends_of_jsd_and_its_zero():
    student, teacher, ids, log_probs, tail = case(4)
    assert torch.equal(top_k_jsd(student, ids, log_probs, tail, 0.0), top_k_forward_kl(student, ids, log_probs, tail))
    with pytest.raises(ValueError, match="beta is 1"):
        top_k_jsd(student, ids, log_probs, tail, 1.0)
    torch.testing.assert_close(top_k_jsd(teacher, ids, log_probs, tail), torch.zeros(R, dtype=torch.float64), atol=1e-12, rtol=0)

"""Relation distillation: published cases, the form without logits, gradients, variants that must differ."""

import pytest
import torch

from mmkd.losses import cross_entropy, forward_kl, head_gram, relation, relation_from_hidden

F64 = torch.float64
ZT = torch.tensor([[2.0, 0.5, -1.0, 0.0], [1.5, 1.0, -0.5, 0.2], [0.3, 2.1, 0.4, -0.6]], dtype=F64)
ZS = torch.tensor([[1.0, 0.2, 0.1, -0.3], [0.9, 1.4, -0.2, 0.0], [0.5, 1.0, 0.8, -0.1]], dtype=F64)
RESPONSE_T = torch.tensor([[-0.2, 0.3, 2.4, 0.9], [0.1, -0.4, 0.8, 2.2]], dtype=F64)
RESPONSE_S = torch.tensor([[0.4, 0.0, 1.1, 0.7], [-0.3, 0.6, 0.5, 1.0]], dtype=F64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=F64), rtol=0, atol=tolerance)


def cosine(a, b):
    a, b = (a @ a.T).flatten(), (b @ b.T).flatten()
    return 1 - a @ b / (a.norm() * b.norm())


def test_L3_relation():
    gram_s, gram_t = (ZS @ ZS.T), (ZT @ ZT.T)
    close(gram_t, [[5.25, 4.00, 1.25], [4.00, 3.54, 2.23], [1.25, 2.23, 5.02]])
    close(gram_s, [[1.14, 1.16, 0.81], [1.16, 2.81, 1.69], [0.81, 1.69, 1.90]])
    close((gram_s * gram_t).sum() / (gram_s.norm() * gram_t.norm()), 0.8888248553)
    close(relation(ZS, ZT), 0.1111751447)
    close(relation(3 * ZS, ZT), 0.1111751447)
    unit = torch.nn.functional.normalize
    close(relation(unit(ZS), unit(ZT)), 0.0390446873)  # normalised rows: another loss
    close(relation(ZS.softmax(-1), ZT.softmax(-1)), 0.0402531459)  # probabilities: another loss


def test_L4_mean_over_images():
    second_t, second_s = 2 * ZT[[2, 0, 1]], ZS[[1, 2, 0]]
    close(relation(second_s, second_t), 0.1175415447)
    close((relation(ZS, ZT) + relation(second_s, second_t)) / 2, 0.1143583447)
    s = torch.cat([(x @ x.T).flatten() for x in (ZS, second_s)])
    t = torch.cat([(x @ x.T).flatten() for x in (ZT, second_t)])
    close(1 - s @ t / (s.norm() * t.norm()), 0.2422062888)  # the released code's flattened batch


def test_L5_totals():
    ce = cross_entropy(RESPONSE_S, torch.tensor([2, 3])).mean()
    response, visual = forward_kl(RESPONSE_S, RESPONSE_T).mean(), forward_kl(ZS, ZT).mean()
    close(ce + response + visual + 0.5 * relation(ZS, ZT), 1.3724518534)
    close(ce + response + visual + relation(ZS, ZT), 1.4280394258)
    close(ce + response, 1.1466208556)


def test_L7_gradient():
    s = ZS.clone().requires_grad_()
    relation(s, ZT).backward()
    close(s.grad, [[-0.1757437788, -0.1067991391, 0.0127498658, 0.0348088942],
                   [0.0248749440, 0.1418594793, 0.0123011997, 0.0162771767],
                   [0.0276270304, 0.0128576084, -0.0485373757, 0.0010041548]])  # fmt: skip


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda x: relation(x, ZT), ZS.clone().requires_grad_())


def towers(dtype, bias, noise=0.5):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    h = normal(30, 12)
    h_s, h_t = h + noise * normal(30, 12), torch.cat([h, noise * normal(30, 4)], 1)
    w_s, w_t = normal(700, 12), normal(800, 16)
    b_s, b_t = (normal(700), normal(800)) if bias else (None, None)
    return [None if x is None else x.to(dtype) for x in (h_s, w_s, b_s, h_t, w_t, b_t)]


@pytest.mark.parametrize("bias", [False, True])
def test_without_logits_equals_with_logits(bias):
    for dtype, tolerance in ((F64, 1e-11), (torch.float32, 2e-6)):
        h_s, w_s, b_s, h_t, w_t, b_t = towers(dtype, bias)
        exact = [None if x is None else x.double() for x in (h_s, w_s, b_s, h_t, w_t, b_t)]
        leaf, exact_leaf = h_s.clone().requires_grad_(), exact[0].clone().requires_grad_()
        found = relation_from_hidden(leaf, head_gram(w_s, b_s, block=128), h_t, head_gram(w_t, b_t))
        y_s, y_t = exact_leaf @ exact[1].T, exact[3] @ exact[4].T
        if bias:
            y_s, y_t = y_s + exact[2], y_t + exact[5]
        expected = cosine(y_s, y_t)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
        found.backward()
        expected.backward()
        assert (leaf.grad - exact_leaf.grad).norm() <= 10 * tolerance * exact_leaf.grad.norm()


def test_gradient_reaches_a_trained_head():
    h_s, w_s, b_s, h_t, w_t, b_t = towers(F64, True)
    inputs = (h_s[:4], w_s[:6].clone().requires_grad_(), b_s[:6].clone().requires_grad_())
    gram_t = head_gram(w_t, b_t)
    assert torch.autograd.gradcheck(
        lambda h, w, b: relation_from_hidden(h, head_gram(w, b, block=4), h_t[:4], gram_t), inputs
    )


def test_small_distances_keep_their_digits_in_float32():
    h_s, _, _, h_t, _, _ = towers(torch.float32, False, noise=1e-3)
    exact = cosine(h_s.double(), h_t.double())
    torch.testing.assert_close(relation(h_s, h_t).double(), exact, rtol=1e-3, atol=0)
    assert exact < 1e-5


def test_permuting_tokens_and_half_precision():
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(relation(ZS[order], ZT[order]), relation(ZS, ZT))
    assert abs(relation(ZS[order], ZT) - relation(ZS, ZT)) > 1e-3
    large = (1000 * torch.randn(20, 500)).half()  # a float16 Gram matrix would overflow
    assert relation(large, large).isfinite() and relation(large, large).dtype == torch.float32


def test_zero_rows_give_no_nan():
    s = torch.zeros(3, 4, requires_grad=True)
    relation(s, ZT.float()).backward()
    assert s.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"3 visual tokens .* 2 of the teacher"):
        relation(ZS, ZT[:2])
    with pytest.raises(ValueError, match="do not fit"):
        relation_from_hidden(ZS, torch.eye(7), ZT, torch.eye(4))


@pytest.mark.parametrize("block", [3, 700, 10**6])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_gradient_of_the_gram_matrix_of_a_head(dtype, block):
    weight = towers(dtype, bias=False)[1]
    factor = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=F64)
    leaf, plain = weight.clone().requires_grad_(), weight.double().requires_grad_()
    gram = head_gram(leaf, block=block)
    (gram * factor).sum().backward()
    ((plain.T @ plain) * factor).sum().backward()
    assert leaf.grad.dtype == dtype
    assert (leaf.grad.double() - plain.grad).norm() <= (1e-12 if dtype == F64 else 2.5e-3) * plain.grad.norm()
    torch.testing.assert_close(gram.double(), (plain.T @ plain).detach(), rtol=1e-5, atol=1e-4)


def test_autocast_changes_nothing():
    h_s, w_s, b_s, h_t, w_t, b_t = towers(torch.float32, bias=True, noise=0.01)

    def both():
        grams = head_gram(w_s, b_s), head_gram(w_t, b_t)
        return relation_from_hidden(h_s, grams[0], h_t, grams[1]), relation(h_s, h_t)

    expected = both()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(found, value) for found, value in zip(both(), expected, strict=True))

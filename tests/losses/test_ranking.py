"""Contrastive partial ranking: published cases, gradient, options, edges."""

import pytest
import torch

from mmkd.losses import contrastive, contrastive_partial_ranking, hard_negatives, valid_negatives

F64 = torch.float64
S = torch.tensor([[0.62, 0.50, 0.48, 0.41, 0.30, 0.05]], dtype=F64)
P = torch.tensor([[0.97, 0.35, 0.60, 0.02, 0.20, 0.90]], dtype=F64)
POSITIVE = torch.tensor([[True, False, False, False, False, False]])
MINED = torch.tensor([[1, 2, 3, 4]])
BATCH_S = torch.tensor([[0.60, 0.45, 0.20], [0.35, 0.70, 0.40], [0.10, 0.30, 0.55]], dtype=F64)
BATCH_P = torch.tensor([[0.98, 0.40, 0.05], [0.30, 0.99, 0.55], [0.01, 0.70, 0.96]], dtype=F64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=F64), rtol=0, atol=tolerance)


def ranking(s=S, p=P, threshold=0.1, **options):
    return contrastive_partial_ranking(s, p.gather(-1, MINED), MINED, 0.1, threshold, **options)


def test_C1_one_query():
    assert torch.equal(hard_negatives(S, POSITIVE, 4), MINED)
    close(ranking(), [2.8792848986])
    close(ranking(rank_reduction="mean_valid"), [0.9597616329])
    itc = contrastive(S, POSITIVE, 0.1)
    close(itc, [0.5390373677])
    close(itc + ranking(), [3.4183222664])
    assert valid_negatives(P.gather(-1, MINED), MINED).tolist() == [3]


def test_C2_threshold():
    close(ranking(threshold=0.5), [1.0589309455])
    close(ranking(threshold=0.99), [0.0])
    close(ranking(threshold=0.0), [2.8792848986])
    assert valid_negatives(P.gather(-1, MINED), MINED, 0.0).tolist() == [4]


def test_C3_agreement():
    agreeing = torch.tensor([[0.97, 0.8, 0.7, 0.6, 0.5, 0.9]], dtype=F64)
    close(ranking(p=agreeing, threshold=0.0), [1.6542182847])
    assert ranking(p=agreeing, threshold=0.0) < ranking()


def test_C4_gradient():
    s = S.clone().requires_grad_()
    ranking(s).sum().backward()
    close(s.grad, [[0, 0.7216311808, -6.5317361146, 11.8616909965, -6.0515860629, 0]])
    assert abs(s.grad.sum()) < 1e-12


def test_C5_batch_in_both_directions():
    own = torch.eye(3, dtype=torch.bool)
    losses, itc = [], []
    for s, p in ((BATCH_S, BATCH_P), (BATCH_S.T, BATCH_P.T)):
        mined = hard_negatives(s, own, 2)
        losses.append(contrastive_partial_ranking(s, p.gather(-1, mined), mined, 0.1, 0.1))
        itc.append(contrastive(s, own, 0.1).mean())
    close(losses[0], [0.0788897343, 0.4740769842, 0.1269280110])
    close(losses[1], [0.0788897343, 1.7014132780, 0.1269280110])
    total = (losses[0].mean() + losses[1].mean()) / 2
    close(total, 0.4311876255)
    close(torch.stack(itc), [0.1274423314, 0.1355245417])
    close(total + sum(itc) / 2, 0.5626710620)


def test_C6_cosines():
    image, texts = torch.tensor([1.0, 2.0, 2.0], dtype=F64), torch.tensor([[2.0, 0, 1], [0, 3, 4]], dtype=F64)
    unit = torch.nn.functional.normalize
    close(unit(texts) @ unit(image, dim=0), [0.5962847940, 0.9333333333])


def reference(s, p, mined, tau, threshold):
    """One query, plain loops."""
    order = sorted(range(len(mined)), key=lambda i: -p[i])
    z = [s[mined[i]].double() / tau for i in order]
    total = s.new_zeros((), dtype=F64)
    for j, i in enumerate(order):
        if p[i] < threshold:
            break
        total = total + torch.stack(z[j:]).logsumexp(0) - z[j]
    return total


def test_random_against_loops_in_float32():
    generator = torch.Generator().manual_seed(0)
    s, p = torch.rand(10, 40, generator=generator), torch.rand(10, 40, generator=generator)
    mined = hard_negatives(s, torch.eye(10, 40, dtype=torch.bool), 16)
    scores = p.gather(-1, mined)
    found = contrastive_partial_ranking(s, scores, mined, 0.07, 0.4)
    exact = torch.stack(
        [reference(s[i], scores[i].tolist(), mined[i].tolist(), 0.07, 0.4) for i in range(10)]
    )
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


def test_gradcheck_with_learnable_temperature():
    s, tau = S.clone().requires_grad_(), torch.tensor(0.1, dtype=F64, requires_grad=True)
    scores = P.gather(-1, MINED)
    assert torch.autograd.gradcheck(
        lambda x, t: contrastive_partial_ranking(x, scores, MINED, t, 0.1), (s, tau)
    )
    loss = contrastive_partial_ranking(s, scores, MINED, tau, 0.1, detach_temperature=True).sum()
    assert torch.autograd.grad(loss, tau, allow_unused=True) == (None,)


def test_options():
    close(ranking(top_m=1), [1.0589309455])
    # teacher order 0.60, 0.35, 0.20, 0.02: the gap 0.15 after the second ends the list there
    torch.testing.assert_close(ranking(margin=0.2), ranking(top_m=1))
    easy = torch.zeros(1, 6, dtype=torch.bool)
    torch.testing.assert_close(ranking(easy=easy), ranking())
    easy[0, 5] = True
    z = S[0] / 0.1
    first = torch.stack([z[2], z[1], z[4], z[3], z[5]]).logsumexp(0) - z[2]
    close(ranking(easy=easy, top_m=1), [first.item()])


def test_ties_keep_the_students_order():
    level = torch.full_like(P, 0.5)
    torch.testing.assert_close(
        ranking(p=level), ranking(p=torch.tensor([[1, 0.9, 0.8, 0.7, 0.6, 0.0]], dtype=F64))
    )


def test_missing_candidates():
    mined = hard_negatives(S, torch.tensor([[True, False, False, True, True, True]]), 4)
    assert mined.tolist() == [[1, 2, -1, -1]]
    scores = P.gather(-1, mined.clamp(min=0))
    s = S.clone().requires_grad_()
    found = contrastive_partial_ranking(s, scores, mined, 0.1, 0.1)
    torch.testing.assert_close(
        found.detach(), contrastive_partial_ranking(S, scores[:, :2], mined[:, :2], 0.1, 0.1)
    )
    found.sum().backward()
    assert s.grad.isfinite().all() and (s.grad[0, [0, 3, 4, 5]] == 0).all()
    lone = torch.tensor([[1, -1]])
    assert contrastive_partial_ranking(S, P[:, :2], lone, 0.1, 0.1).item() == 0


def test_several_positives_share_the_target():
    both = torch.tensor([[True, True, False, False, False, False]])
    log_p = (S / 0.1).log_softmax(-1)
    close(contrastive(S, both, 0.1), [-(log_p[0, 0] + log_p[0, 1]).item() / 2])


def test_errors():
    with pytest.raises(ValueError, match=r"\[B, M\], \[B, K\], \[B, K\]"):
        contrastive_partial_ranking(S, P, MINED, 0.1)
    with pytest.raises(ValueError, match="'max'"):
        ranking(rank_reduction="max")

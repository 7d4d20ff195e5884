"""DBiLD and its knee: published cases, an explicit pairwise float64 reference, gradients, invariances,
edges."""

import math

import pytest
import torch

from mmkd.losses import DBiLD, cross_entropy, dbild, kneedle_k
from mmkd.losses.difference import _gaps

F64 = torch.float64
ZT = torch.tensor([6.1, 0.5, 4.6, 0.1, 0.9, 5.2, 3.9, -0.4], dtype=F64)
ZS = torch.tensor([2.0, 4.0, 2.6, 0.4, -0.7, 0.9, 1.4, 0.1], dtype=F64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=F64), rtol=0, atol=tolerance)


def row(s=ZS, t=ZT, **options):
    return dbild(s[None], t[None], **{"window": 8, **options})[0]


def raw_k(values, min_k=1):
    ordered = torch.as_tensor(values, dtype=F64).sort(descending=True).values
    return kneedle_k(ordered[None], min_k)[0].item()


def pairs(z, ids, temperature):
    """Softmax over all pairwise differences, formed one by one."""
    k = len(ids)
    differences = torch.stack([z[ids[a]] - z[ids[b]] for a in range(k) for b in range(a + 1, k)])
    return (differences / temperature).log_softmax(0)


def reference_branch(s, t, ids, temperature, direction):
    if len(ids) < 2:
        return s.new_zeros(())
    log_q, log_p = pairs(s, ids, temperature), pairs(t, ids, temperature)
    over, under = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
    return (over.exp() * (over - under)).sum()


def reference_k(values, window, min_k):
    s = values.sort(descending=True).values[:window].tolist()
    gaps = [1 - i / (len(s) - 1) - (v - s[-1]) / (s[0] - s[-1]) for i, v in enumerate(s)]
    return min(max(gaps.index(max(gaps)) + 1, min_k), len(s))


def reference(s, t, temperature=3.0, window=64, min_k=4, direction="reverse", fixed_k=None):
    s, t = s.double(), t.double()
    total = 0
    for leader in (t, s):
        k = fixed_k or reference_k(leader.detach(), window, min_k)
        ids = leader.detach().argsort(descending=True)[:k].tolist()
        total = total + reference_branch(s, t, ids, temperature, direction)
    return total


def test_S1_knee():
    assert raw_k(ZT) == 5 and raw_k(ZS) == 2 and raw_k(ZS, 4) == 4
    top = torch.tensor([[10, 2, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8]], dtype=F64)
    close(_gaps(top)[0].amax(), 0.7267080745)
    assert raw_k([10, 2, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8]) == 2
    assert raw_k([3.0] * 8) == 1


def test_S1_gaps():
    gaps, _ = _gaps(torch.stack([ZT, ZS]).sort(-1, descending=True).values)
    close(
        gaps[0], [0, -0.0043956044, -0.0549450549, -0.0901098901, 0.2285714286, 0.1472527473, 0.0659340659, 0]
    )
    close(
        gaps[1], [0, 0.1550151976, 0.1398176292, 0.1246200608, 0.0881458967, 0.0516717325, -0.0273556231, 0]
    )


def test_S2_fixed_k():
    close(row(fixed_k=3), 0.3614477306)
    close(row(fixed_k=3, direction="forward"), 0.3558557761)
    close(reference_branch(ZS, ZT, [0, 5, 2], 3.0, "reverse"), 0.0775409438)
    close(reference_branch(ZS, ZT, [1, 2, 0], 3.0, "reverse"), 0.2839067868)
    close(reference_branch(ZS, ZT, [0, 5, 2], 3.0, "forward"), 0.0741734265)
    close(reference_branch(ZS, ZT, [1, 2, 0], 3.0, "forward"), 0.2816823497)
    close(pairs(ZT, [0, 5, 2], 3.0).exp(), [0.3198730563, 0.3906938333, 0.2894331104])
    close(pairs(ZS, [0, 5, 2], 3.0).exp(), [0.5100337955, 0.2894001471, 0.2005660574])
    close(pairs(ZS, [1, 2, 0], 3.0).exp(), [0.3347469590, 0.4088608590, 0.2563921821])
    close(pairs(ZT, [1, 2, 0], 3.0).exp(), [0.2509096485, 0.1521843946, 0.5969059569])


def test_S3_dynamic_k():
    close(row(), 0.6478614197)
    close(row(min_k=3), 0.3500438428)
    close(row(min_k=1), 0.0661370560)
    close(reference_branch(ZS, ZT, ZT.argsort(descending=True)[:5].tolist(), 3.0, "reverse"), 0.0661370560)  # L_t
    close(reference_branch(ZS, ZT, ZS.argsort(descending=True)[:4].tolist(), 3.0, "reverse"), 0.5817243637)  # L_s
    close(reference_branch(ZS, ZT, ZT.argsort(descending=True)[:5].tolist(), 1.0, "reverse"), 0.5418255435)
    close(reference_branch(ZS, ZT, ZS.argsort(descending=True)[:4].tolist(), 1.0, "reverse"), 4.0413772763)
    close(row(temperature=1.0), 4.5832028198)


def test_S3_softmax_without_differences_is_another_loss():
    def plain(ids):
        log_q, log_p = (ZS[ids] / 3).log_softmax(0), (ZT[ids] / 3).log_softmax(0)
        return (log_q.exp() * (log_q - log_p)).sum()

    # The specification's number is that of four entries on the teacher's side too, though k_t is 5.
    teacher_led, student_led = plain(ZT.argsort(descending=True)[:4]), plain(ZS.argsort(descending=True)[:4])
    close(teacher_led, 0.0558016654)
    close(plain(ZT.argsort(descending=True)[:5]), 0.0621181193)
    close(student_led, 0.4483336567)
    assert abs(teacher_led + student_led - row()) > 0.1


def test_S4_invariances():
    assert abs(row(ZT, ZT)) < 1e-14
    close(row(ZS - 2, ZT + 5), 0.6478614197)
    assert row(fixed_k=2) == 0 and row(fixed_k=1) == 0


def test_S5_gradient():
    s = ZS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(row(s), s)
    close(
        gradient,
        [-0.1461379800, 0.1611429965, -0.0659692700, 0, 0.0172947601, -0.0403176806, 0.0739871737, 0],
    )
    assert abs(gradient.sum()) < 1e-12


def test_S6_total_with_shift_and_mask():
    t = torch.stack([ZT.roll(i) for i in range(5)])
    s = torch.stack([ZS, ZS.roll(2), ZS.roll(1), ZS.roll(3), ZS.roll(3)])
    used = [1, 2, 3]  # labels -100, -100, 2, 5, 0: position i predicts label i + 1
    ce = cross_entropy(s[used], torch.tensor([2, 5, 0]))
    align = dbild(s, t, window=8)
    switch = dbild((s + t) / 2, t, window=8)
    close(ce, [2.4433489914, 5.1433489914, 3.5433489914])
    close(align[used], [0.5201084564, 1.0588187053, 0.6478614197])
    close(switch[used], [0.2239352349, 0.0874672240, 0.1355094126])
    close(ce.mean() + align[used].mean() + switch[used].mean(), 4.6012491424)
    close(align[[2, 3, 4]].mean(), 0.9218329435)  # the unshifted mask: another number


OPTIONS = [dict(), dict(window=16, min_k=3), dict(window=256), dict(temperature=1.0), dict(fixed_k=8),
           dict(fixed_k=40), dict(direction="forward"), dict(fixed_k=3, temperature=0.5)]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_float32_against_explicit_pairs(vocabulary, options):
    generator = torch.Generator().manual_seed(vocabulary)
    s, t = (3 * torch.randn(5, vocabulary, generator=generator) for _ in range(2))
    leaf, exact_leaf = s.clone().requires_grad_(), s.double().requires_grad_()
    found = dbild(leaf, t, **options)
    exact = torch.stack([reference(a, b, **options) for a, b in zip(exact_leaf, t, strict=False)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    found.sum().backward()
    exact.sum().backward()
    assert (leaf.grad - exact_leaf.grad).norm() <= 2e-6 * exact_leaf.grad.norm()


def test_tau_squared_and_max_k():
    close(row(tau_squared=True), 9 * 0.6478614197, 1e-8)
    torch.testing.assert_close(row(max_k=3, min_k=3), row(fixed_k=3))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction):
    s = torch.stack([ZS, ZS.flip(0), 2 * ZS]).requires_grad_()
    t = torch.stack([ZT, ZT, ZT.roll(3)])
    assert torch.autograd.gradcheck(lambda x: dbild(x, t, window=8, direction=direction), s)


def test_value_and_grad_equals_autograd():
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(9, 400, generator=generator) for _ in range(2))
    s[0, :5], t[1, 7] = -math.inf, -math.inf
    for loss in (DBiLD(), DBiLD(fixed_k=8), DBiLD(direction="forward", tau_squared=True)):
        leaf = s.clone().requires_grad_()
        values = loss(leaf, t)
        values.sum().backward()
        with torch.no_grad():
            found = loss.value_and_grad(s, t, None)
        torch.testing.assert_close(found[0], values.detach())
        torch.testing.assert_close(found[1], leaf.grad)


def test_minus_infinity_is_never_chosen_and_never_nan():
    s, t = torch.cat([ZS, ZS.new_full((5,), -math.inf)]), torch.cat([ZT, ZT.new_full((5,), -math.inf)])
    torch.testing.assert_close(dbild(s[None], t[None], window=64)[0], row())
    t = torch.full((2, 10), -math.inf, dtype=F64)
    t[0, 0], t[1, :2] = 1.0, torch.tensor([1.0, 0.0])
    s = torch.randn(2, 10, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = dbild(s, t)
    values.sum().backward()
    assert (values == 0).all() and (s.grad == 0).all()  # one or two entries left: nothing to compare


def test_huge_logits_stay_finite():
    s = torch.tensor([[1e30, -1e30, 0.0, 1.0, 2.0], [-3e38, 0.0, 1.0, 2.0, 3.0]]).requires_grad_()
    t = torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0, -2.0]])
    for direction in ("reverse", "forward"):
        values = dbild(s, t, direction=direction)
        (gradient,) = torch.autograd.grad(values.sum(), s)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_teacher_gets_no_gradient():
    s, t = ZS.clone().requires_grad_(), ZT.clone().requires_grad_()
    row(s, t).backward()
    assert t.grad is None and s.grad is not None


def test_errors():
    for options, words in (
        (dict(direction="up"), "'up'"),
        (dict(temperature=0.0), "temperature"),
        (dict(window=0), "window"),
    ):
        with pytest.raises(ValueError, match=words):
            row(**options)
        with pytest.raises(ValueError, match=words):
            DBiLD(**options)
    with pytest.raises(ValueError, match="differ; gather"):
        dbild(torch.zeros(1, 3), torch.zeros(1, 4))

"""KL, reverse KL, JSD and cross-entropy: published cases, float64 references, gradients, -inf."""

import math

import pytest
import torch

from mmkd.losses import JSD, CrossEntropy, ForwardKL, ReverseKL, cross_entropy, forward_kl, jsd, reverse_kl

F64 = torch.float64
# LLaVA-KD case: positions 0-2 visual, 3-4 prompt, 5-6 response; labels 2 and 3 at the end.
ZT = [[2.0, 0.5, -1.0, 0.0], [1.5, 1.0, -0.5, 0.2], [0.3, 2.1, 0.4, -0.6], [0.0, 0.5, 1.5, 0.1],
      [-0.2, 0.3, 2.4, 0.9], [0.1, -0.4, 0.8, 2.2], [1.2, 0.0, 0.3, 0.6]]  # fmt: skip
ZS = [[1.0, 0.2, 0.1, -0.3], [0.9, 1.4, -0.2, 0.0], [0.5, 1.0, 0.8, -0.1], [0.2, 0.1, 0.9, 0.4],
      [0.4, 0.0, 1.1, 0.7], [-0.3, 0.6, 0.5, 1.0], [0.7, 0.3, -0.2, 0.9]]  # fmt: skip
# LLaVA-MoD case: the teacher's last column is padding of its head.
MOD_T = [
    [2.0, 0.0, -1.0, 0.5, 9.0],
    [0.3, 1.7, 0.1, -0.4, -2.0],
    [-0.5, 0.2, 2.5, 0.9, 1.0],
    [0.0, 0.6, -0.2, 1.8, 0.0],
]
MOD_S = [[1.0, 0.4, -0.2, 0.3], [0.6, 0.9, 0.2, 0.0], [0.1, 0.0, 1.2, 0.8], [0.5, 0.2, 0.1, 0.7]]


def tensor(x):
    return torch.tensor(x, dtype=F64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found.double(), tensor(expected), rtol=0, atol=tolerance)


def reference(name, s, t, temperature=1.0, beta=0.5):
    """The definitions, written plainly in float64."""
    s, t = s.double() / temperature, t.double() / temperature
    q, p = s.softmax(-1), t.softmax(-1)
    if name == "forward":
        value = p * (p / q).log()
    elif name == "reverse":
        value = q * (q / p).log()
    else:
        m = beta * p + (1 - beta) * q
        value = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    return value.sum(-1) * temperature**2


def test_L1_kl_per_position():
    values = [
        0.1606098675,
        0.1042871958,
        0.2458332129,
        0.0706341199,
        0.2071432374,
        0.2340460000,
        0.0782128569,
    ]
    close(forward_kl(tensor(ZS), tensor(ZT)), values, 1e-10)


def test_L2_response_terms():
    s, t = tensor(ZS), tensor(ZT)
    rows, targets = [4, 5], torch.tensor([2, 3])
    close(cross_entropy(s[rows], targets).mean(), 0.9260262369)
    close(forward_kl(s, t)[rows].mean(), 0.2205946187)
    close(forward_kl(s, t)[rows].sum(), 0.4411892375)
    close(forward_kl(s, t)[[5, 6]].mean(), 0.1561294285)  # the unshifted mask: another number
    close(reverse_kl(s, t)[rows].mean(), 0.2745603369)


def test_L3_visual_kl():
    values = forward_kl(tensor(ZS), tensor(ZT))[:3]
    close(values.mean(), 0.1702434254)
    close(values.sum(), 0.5107302761)


def test_L6_crop_before_softmax():
    s, t = tensor(ZS), torch.nn.functional.pad(tensor(ZT), (0, 1), value=0.7)
    close(forward_kl(s, t[:, :4])[[4, 5]].mean(), 0.2205946187)
    late = t.softmax(-1)[:, :4]
    wrong = (late * (late.log() - s.log_softmax(-1))).sum(-1)[[4, 5]].mean()
    close(wrong, 0.0772499861)  # (the specification writes 0.0772498610: two digits have changed places)


def test_M1_mimic_loss():
    s, t = tensor(MOD_S), tensor(MOD_T)[:, :4]
    kl = forward_kl(s, t)
    close(kl, [0.1856793193, 0.1387242856, 0.2025208273, 0.2037712197])
    close(kl[[1, 2]].mean(), 0.1706225564)
    close(kl[[2, 3]].mean(), 0.2031460235)
    close(kl.mean(), 0.1826739130)
    soft = -(t.softmax(-1) * s.log_softmax(-1)).sum(
        -1
    )  # the released code's value: larger by the teacher's entropy
    close(soft, [1.0639604946, 1.1794933567, 1.0240491029, 1.2552797448])
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft, kl + entropy)


def test_M1_language_loss_and_sequence():
    targets = torch.tensor([2, 3])
    losses = cross_entropy(tensor(MOD_S)[[1, 2]], targets)
    close(losses.mean(), 1.4535483788)
    close(-losses.sum(), -2.9070967576)
    close(-cross_entropy(tensor(MOD_T)[[1, 2], :4], targets).sum(), -3.9532228702)


def test_M4_total():
    kl = forward_kl(tensor(MOD_S), tensor(MOD_T)[:, :4])[[1, 2]].mean()
    lm = cross_entropy(tensor(MOD_S)[[1, 2]], torch.tensor([2, 3])).mean()
    close(kl + lm + 0.01 * 1.1194202725, 1.6353651380)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("vocabulary", [2, 257, 5000])
@pytest.mark.parametrize("name", ["forward", "reverse", 0.1, 0.5, 0.9])
def test_float32_against_float64_reference(name, vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    s, t = (2 * torch.randn(16, vocabulary, generator=generator) for _ in range(2))
    if name == "forward":
        found, exact = forward_kl(s, t, temperature), reference(name, s, t, temperature)
    elif name == "reverse":
        found, exact = reverse_kl(s, t, temperature), reference(name, s, t, temperature)
    else:
        found, exact = jsd(s, t, name, temperature), reference("jsd", s, t, temperature, name)
    assert found.dtype == torch.float32
    # With two columns nothing averages out: there the rounding of the inputs' own differences is the limit.
    floor = 5e-7 * max(1.0, temperature**2) if vocabulary == 2 else 0
    assert ((found.double() - exact).abs() <= 2e-6 * exact + floor).all()


def test_cross_entropy_float32_against_float64():
    s = 3 * torch.randn(32, 5000, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(32) * 7
    exact = -s.double().log_softmax(-1)[torch.arange(32), targets]
    assert ((cross_entropy(s, targets).double() - exact).abs() <= 2e-6 * exact).all()


def test_jsd_ends_are_the_kls_and_the_middle_is_symmetric():
    s, t = tensor(ZS), tensor(ZT)
    assert torch.equal(jsd(s, t, 0.0, 2.0), forward_kl(s, t, 2.0))
    assert torch.equal(jsd(s, t, 1.0, 2.0), reverse_kl(s, t, 2.0))
    torch.testing.assert_close(jsd(s, t, 0.5), jsd(t, s, 0.5))
    torch.testing.assert_close(jsd(s, t, 0.3), jsd(t, s, 0.7))
    assert not torch.allclose(jsd(s, t, 0.3), jsd(t, s, 0.3))
    torch.testing.assert_close(jsd(s, t, 1e-7) / 1e-7, forward_kl(s, t), rtol=1e-5, atol=1e-8)


def test_directions_differ_and_equal_rows_cost_nothing():
    s, t = tensor(ZS), tensor(ZT)
    assert not torch.allclose(forward_kl(s, t), reverse_kl(s, t))
    torch.testing.assert_close(forward_kl(s, t), reverse_kl(t, s))
    for loss in (forward_kl, reverse_kl, jsd):
        torch.testing.assert_close(loss(s, s + 4), torch.zeros(7, dtype=F64), rtol=0, atol=1e-14)


def test_shift_and_temperature():
    s, t = tensor(ZS), tensor(ZT)
    torch.testing.assert_close(forward_kl(s - 3, t + 9), forward_kl(s, t))
    torch.testing.assert_close(forward_kl(s, t, 2.0), 4 * forward_kl(s / 2, t / 2))


LOSSES = [
    CrossEntropy(),
    ForwardKL(),
    ForwardKL(2.5),
    ReverseKL(),
    ReverseKL(0.5),
    JSD(0.5),
    JSD(0.1, 2.0),
    JSD(0.0),
    JSD(1.0),
]


def random_rows(dtype, rows=6, vocabulary=50):
    generator = torch.Generator().manual_seed(3)
    s, t = (2 * torch.randn(rows, vocabulary, generator=generator, dtype=F64) for _ in range(2))
    return s.to(dtype), t.to(dtype), torch.arange(rows) % vocabulary


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_gradcheck(loss):
    s, t, targets = random_rows(F64, 3, 7)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, targets), s.requires_grad_())


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_closed_form_equals_autograd(loss, forbidden):
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 2e-6)):
        s, t, targets = random_rows(dtype)
        if forbidden:
            s[:, 10], t[:, 11], s[:, 12], t[:, 12] = -math.inf, -math.inf, -math.inf, -math.inf
        before = s.clone(), t.clone()
        leaf = s.clone().requires_grad_()
        values = loss(leaf, t, targets)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        for shared in (None, {}):
            for _ in range(2):  # the second time from what is shared
                found_values, found_gradient = loss.value_and_grad(s, t, targets, shared)
                torch.testing.assert_close(found_values, values.detach(), rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(found_gradient, gradient, rtol=tolerance, atol=tolerance)
        assert torch.equal(before[0], s) and torch.equal(before[1], t)


def test_sharing_among_losses_changes_nothing():
    s, t, targets = random_rows(torch.float32)
    shared = {}
    for loss in LOSSES:
        alone, together = loss.value_and_grad(s, t, targets), loss.value_and_grad(s, t, targets, shared)
        assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_minus_infinity_is_dropped_from_kl_and_kept_in_jsd():
    s, t = tensor([[0.3, 1.0, -0.5, 0.2]]), tensor([[0.1, 0.4, 0.9, -1.0]])
    s[0, 2] = -math.inf
    p, log_q = t.softmax(-1)[0], s.log_softmax(-1)[0]
    keep = [0, 1, 3]
    close(forward_kl(s, t), [(p[keep] * (p[keep].log() - log_q[keep])).sum().item()], 1e-12)
    close(reverse_kl(t, s), [(p[keep] * (p[keep].log() - log_q[keep])).sum().item()], 1e-12)
    q = s.softmax(-1)[0]
    m = (p + q) / 2
    exact = (p * (p / m).log()).sum() / 2 + (q[keep] * (q[keep] / m[keep]).log()).sum() / 2
    close(jsd(s, t), [exact.item()], 1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_never_nan_with_minus_infinity_but_nan_is_not_hidden(loss):
    s, t, targets = random_rows(torch.float32)
    s[0, 10:], t[1, 10:], s[2, 20:], t[2, :20] = -math.inf, -math.inf, -math.inf, -math.inf
    s[2, 2] = 0.0
    leaf = s.clone().requires_grad_()
    values = loss(leaf, t, targets)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.isfinite().all() and gradient.isfinite().all()
    assert loss.value_and_grad(s, t, targets)[1].isfinite().all()
    s[4, 4] = math.nan
    assert loss(s, t, targets)[4].isnan() and loss.value_and_grad(s, t, targets)[0][4].isnan()


def test_bfloat16_is_computed_in_float32():
    s, t, targets = random_rows(torch.bfloat16)
    for loss in LOSSES:
        found = loss(s, t, targets)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(s.float(), t.float(), targets))


def test_errors():
    s = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        jsd(s, s, 1.5)
    with pytest.raises(ValueError, match="temperature is 0"):
        forward_kl(s, s, 0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        reverse_kl(s, torch.zeros(2, 4))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_torchs_and_its_gradient_autograds(smoothing):
    student = torch.randn(6, 9, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 8, 3, 3, 1, 2])
    wanted = torch.nn.functional.cross_entropy(student, targets, reduction="none", label_smoothing=smoothing)
    loss = CrossEntropy(smoothing)
    torch.testing.assert_close(loss(student, None, targets), wanted)
    values, gradient = loss.value_and_grad(student.detach(), None, targets)
    torch.testing.assert_close(values, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), student)[0])


def test_label_smoothing_leaves_out_what_is_impossible():
    student = torch.tensor([[1.0, 0.3, -math.inf, 0.2]], dtype=F64)
    targets = torch.tensor([1])
    wanted = torch.nn.functional.cross_entropy(student[:, [0, 1, 3]], targets, label_smoothing=0.2)
    loss = CrossEntropy(0.2)
    values, gradient = loss.value_and_grad(student, None, targets)
    torch.testing.assert_close(values[0], wanted)
    torch.testing.assert_close(loss(student, None, targets)[0], wanted)
    assert gradient[0, 2] == 0 and abs(float(gradient.sum())) < 1e-12


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_bounds_is_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(smoothing)

"""What every row loss must keep: closed form, precision, shifts, -inf, the row engine and its budget.

A new loss is added to CASES (and to `extras`, if it takes more than logits and targets).
What a loss's values are is tested in the loss's own file, against a reference written for it.
"""

import math

import pytest
import torch

from mmkd import losses
from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.losses import (
    BDKD,
    DACKL,
    FIRST,
    PLD,
    PWCE,
    TAID,
    AdaptiveKL,
    AdaptiveSkewKL,
    AdaptiveSkewReverseKL,
    SkewKL,
    SkewReverseKL,
    Swing,
    TopKLD,
)

F64 = torch.float64
BAR = 2e-6
CASES = [
    SkewKL(),
    SkewKL(0.5, 2.0),
    SkewKL(0.0),
    SkewReverseKL(),
    SkewReverseKL(0.5, 2.0),
    SkewReverseKL(0.0),
    AdaptiveSkewKL(),
    AdaptiveSkewReverseKL(),
    TopKLD(0),
    TopKLD(8),
    TopKLD(20, 2.0),
    TopKLD(10**6),
    TopKLD(8, form="plain"),
    BDKD(),
    BDKD(0.3, 2.0, 0.5, 2.0),
    AdaptiveKL(),
    AdaptiveKL(0.9, 2.0),
    AdaptiveKL(0.0),
    AdaptiveKL(1.0),
    TAID(),
    PLD(),
    PLD(5, 2.0),
    DACKL(),
    DACKL(0.3, 2.0),
    DACKL(0.0),
    FIRST(),
    FIRST(0.3, other=True, label_smoothing=0.1),
    FIRST(normalise="linear", other=True),
    Swing(),
    Swing(0.5, 3.0, 0.7),
    PWCE(),
    PWCE(0.3, 2.0),
]
# Tested in test_divergence.py, test_difference.py and test_topk.py.
ELSEWHERE = {"CrossEntropy", "ForwardKL", "ReverseKL", "JSD", "DBiLD", "TopKForwardKL"}
every_case = pytest.mark.parametrize("loss", CASES, ids=str)


def test_every_row_loss_of_the_package_is_here():
    row_losses_of = {name for name in losses.__all__ if hasattr(getattr(losses, name), "value_and_grad")}
    assert row_losses_of == {type(loss).__name__ for loss in CASES} | ELSEWHERE


def needs_teacher(loss):
    return not isinstance(loss, (FIRST, PWCE))


def extras(loss, teacher):
    """The tensors that the loss takes beside logits and targets. [R, ...] each"""
    if isinstance(loss, (AdaptiveSkewKL, AdaptiveSkewReverseKL)):
        return (torch.linspace(0.01, 0.4, len(teacher), dtype=teacher.dtype),)
    if isinstance(loss, TAID):
        return (torch.linspace(0.2, 1, len(teacher), dtype=teacher.dtype),)
    if isinstance(loss, DACKL):
        low = torch.linspace(0.02, 0.4, len(teacher), dtype=teacher.dtype)
        return low, low + 0.5
    if isinstance(loss, Swing):
        return torch.linspace(0, 1, len(teacher), dtype=teacher.dtype), torch.arange(len(teacher)) * 11
    if isinstance(loss, PWCE):
        return (torch.full_like(teacher[:, 0], 3.5),)
    if isinstance(loss, FIRST):
        log_probs, ids = teacher.log_softmax(-1).topk(7)
        return ids, log_probs
    return ()


def draw(rows=6, vocabulary=50, dtype=F64, seed=3):
    """Logits of student and teacher, targets, all the same numbers in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return s.to(dtype), t.to(dtype), torch.arange(rows) * 7 % vocabulary


def double(tensors):
    return tuple(x.double() if x.is_floating_point() else x for x in tensors)


def exact(loss, s, t, targets, extra):
    """Values and gradient of the plain definition, in float64."""
    leaf = s.double().requires_grad_()
    values = loss(leaf, t.double(), targets, *double(extra))
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def close(found, expected, bar=BAR, floor=0.0):
    """Each row within the bar, relative to the row."""
    error = (found.double() - expected).reshape(len(expected), -1).norm(dim=1)
    assert (error <= bar * expected.reshape(len(expected), -1).norm(dim=1) + floor).all(), error.max()


# Losses in which a gradient is stopped: differences of their values follow what is stopped, too. Tested in their own files.
STOPPED = (AdaptiveKL, AdaptiveSkewReverseKL, PWCE, TAID)


@pytest.mark.parametrize("loss", [x for x in CASES if not isinstance(x, STOPPED)], ids=str)
def test_gradient_is_that_of_finite_differences(loss):
    s, t, targets = draw(3, 9)
    extra = extras(loss, t)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, targets, *extra), s.requires_grad_())


@every_case
def test_closed_form_is_the_definition(loss):
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, BAR)):
        s, t, targets = draw(dtype=dtype)
        extra = extras(loss, t)
        given = [x.clone() for x in (s, t, *extra)]
        values, gradient = exact(loss, s, t, targets, extra)
        for shared in (None, {}):
            for _ in range(2):  # the second time from what is shared
                found = loss.value_and_grad(s, t, targets, shared, *extra)
                assert found[0].dtype == found[1].dtype == dtype
                close(found[0], values, tolerance)
                close(found[1], gradient, tolerance)
        assert all(torch.equal(a, b) for a, b in zip(given, (s, t, *extra), strict=True))


def test_sharing_among_losses_changes_nothing():
    s, t, targets = draw(dtype=torch.float32)
    shared = {}
    for loss in [*CASES, *reversed(CASES)]:
        extra = extras(loss, t)
        alone, together = (loss.value_and_grad(s, t, targets, x, *extra) for x in (None, shared))
        assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


@every_case
def test_a_constant_added_to_the_logits_changes_nothing(loss):
    s, t, targets = draw()
    extra = extras(loss, t)
    for moved in ((s + 5, t), (s, t - 11), (s - 3, t + 40)):
        for a, b in zip(exact(loss, *moved, targets, extra), exact(loss, s, t, targets, extra), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_case
def test_rows_stand_alone(loss):
    s, t, targets = draw(dtype=torch.float32)
    extra = extras(loss, t)
    values, gradient = loss.value_and_grad(s, t, targets, {}, *extra)
    for pick in ([4], [2, 0], [5, 5, 1]):
        found = loss.value_and_grad(s[pick], t[pick], targets[pick], {}, *(e[pick] for e in extra))
        assert torch.equal(found[0], values[pick]) and torch.equal(found[1], gradient[pick])


@every_case
def test_minus_infinity_gives_numbers_and_nan_is_not_hidden(loss):
    s, t, targets = draw(dtype=torch.float32)
    s[0, 10:], t[1, 10:], s[2, 20:], t[2, :20] = -math.inf, -math.inf, -math.inf, -math.inf
    s[2, 2], targets[:3] = 0.0, 3
    s[2, 3] = 1.0
    extra = extras(loss, t)
    for found in (exact(loss, s, t, targets, extra), loss.value_and_grad(s, t, targets, {}, *extra)):
        assert all(x.isfinite().all() for x in found)
    close(loss.value_and_grad(s, t, targets, {}, *extra)[1], exact(loss, s, t, targets, extra)[1], 1e-5, 1e-7)
    s[4, 4] = math.nan
    assert loss(s, t, targets, *extra)[4].isnan()
    assert loss.value_and_grad(s, t, targets, {}, *extra)[0][4].isnan()


@every_case
def test_half_precision_gives_float32(loss):
    s, t, targets = draw(dtype=torch.bfloat16)
    extra = extras(loss, t.float())
    found, gradient = loss.value_and_grad(s, t, targets, {}, *extra)
    expected = exact(loss, s, t, targets, extra)
    assert loss(s, t, targets, *extra).dtype == found.dtype == gradient.dtype == torch.float32
    close(loss(s, t, targets, *extra), expected[0])
    close(found, expected[0])
    close(gradient, expected[1])


@every_case
def test_through_the_row_engine(loss):
    """An identity as the head makes the hidden rows the logits, so that what is measured is the loss alone."""
    rows, vocabulary = 9, 300
    s, t, targets = draw(rows, vocabulary, torch.float32)
    extra, head = extras(loss, t), Head(torch.eye(vocabulary))
    values, gradient = exact(loss, s, t, targets, extra)
    keep = torch.arange(rows) % 3 != 1
    for mask in (None, keep, *torch.eye(rows, dtype=torch.bool)):
        some = torch.ones(rows, dtype=torch.bool) if mask is None else mask
        hidden = s.clone().requires_grad_()
        term = RowTerm("x", 1.0, loss, needs_teacher(loss), mask, extra=extra)
        options = dict(teacher_hidden=t, teacher_head=head) if needs_teacher(loss) else {}
        total, sums = row_losses(hidden, head, targets, [term], chunk_bytes=30 * vocabulary, **options)
        (found,) = torch.autograd.grad(total, hidden)
        close(sums["x"][None], values[some].sum()[None])
        close(found[some], gradient[some])
        assert not found[~some].any()


def allocated(call):
    """Most bytes that the allocator had given out at once during the call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max())


@every_case
def test_memory_stays_within_the_budget(loss):
    columns, width, rows = 3000, 8, 1000  # 1000 rows of logits are 11 MiB
    budget = 2 * 2**20
    hidden, theirs = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    head, teacher = Head(torch.randn(columns, width)), Head(torch.randn(columns, width))
    extra = extras(loss, theirs @ teacher.weight.T)
    term = RowTerm("x", 1.0, loss, needs_teacher(loss), extra=extra)
    options = dict(teacher_hidden=theirs, teacher_head=teacher) if needs_teacher(loss) else {}
    targets = torch.zeros(rows, dtype=torch.long)
    peak = allocated(lambda: row_losses(hidden, head, targets, [term], chunk_bytes=budget, **options)[0].backward())
    assert peak <= 1.1 * budget + rows * (width + 1) * 4

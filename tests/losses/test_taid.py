"""TAID: its loss against a float64 reference, its schedule against a loop, and the catalogue's checks."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from mmkd.losses import TAID, TAIDSchedule, forward_kl

BAR = 2e-6


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(s, t, share):
    """One row, by the definition."""
    p, q = softmax((1 - share) * s + share * t), softmax(s)
    return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))


def draw(rows=6, vocabulary=40, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(vocabulary)
    return tuple((scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.97, 1.0])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("vocabulary", [2, 40, 3000])
def test_float32_against_float64_reference(vocabulary, scale, share):
    s, t = draw(vocabulary=vocabulary, scale=scale, dtype=torch.float32)
    shares = torch.full((6,), share, dtype=torch.float64)
    for found in (TAID()(s, t, None, shares), TAID().value_and_grad(s, t, None, {}, shares)[0]):
        assert found.dtype == torch.float32
        for value, a, b in zip(found.tolist(), s.double().numpy(), t.double().numpy(), strict=True):
            expected = reference(a, b, share)
            assert abs(value - expected) <= BAR * expected


def test_t_1_is_the_forward_kl_and_the_teachers_entropy():
    s, t = draw()
    entropy = torch.special.entr(t.softmax(-1)).sum(-1)
    leaf = s.clone().requires_grad_()
    found, expected = TAID()(leaf, t, None, torch.ones(6)), forward_kl(leaf, t)
    torch.testing.assert_close(found, expected + entropy)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf)[0] for x in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t_0_gives_a_gradient_of_exactly_0(dtype):
    s, t = draw(dtype=dtype)
    values, gradient = TAID().value_and_grad(s, t, None, {}, torch.zeros(6))
    assert not gradient.any()
    torch.testing.assert_close(values, torch.special.entr(s.softmax(-1)).sum(-1))


def test_no_gradient_flows_through_the_mixture():
    s, t = draw()
    p, shares = softmax_rows(0.6 * s + 0.4 * t), torch.full((6,), 0.4, dtype=torch.float64)
    leaf = s.clone().requires_grad_()
    found, fixed = TAID()(leaf, t, None, shares), -(p * leaf.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf)[0] for x in (found, fixed)))


def softmax_rows(z):
    return torch.stack([torch.from_numpy(softmax(row)) for row in z.numpy()])


def test_equal_models_have_nothing_to_learn():
    s, _ = draw()
    _, gradient = TAID().value_and_grad(s, s + 3, None, {}, torch.full((6,), 0.7, dtype=torch.float64))
    assert gradient.abs().max() < 1e-14


def loop(losses, total, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99):
    """The schedule by plain numbers; t after each step."""
    t, momentum, previous, found = t_start, 0.0, None, []
    for step, loss in enumerate(losses, start=1):
        if previous is not None:
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            delta = alpha / (1 + math.exp(-momentum)) * (1 - t)
            t = min(t_end, max(t_start + (t_end - t_start) * step / total, t + delta))
        previous = loss
        found.append(t)
    return found


@pytest.mark.parametrize("options", [{}, dict(alpha=0.2, beta=0.5), dict(t_start=0.2, t_end=0.7, alpha=0.05)], ids=str)
def test_schedule_against_a_loop(options):
    generator = torch.Generator().manual_seed(0)
    losses = (5 * torch.rand(50, generator=generator) + 0.1).tolist()
    schedule = TAIDSchedule(**options)
    state, found = schedule.start(), []
    for step, loss in enumerate(losses, start=1):
        state = schedule.next(state, torch.tensor(loss, dtype=torch.float64), step / 200)
        found.append(state[0].item())
    np.testing.assert_allclose(found, loop(losses, 200, **options), rtol=1e-12)
    assert all(b >= a for a, b in pairwise(found))  # t never decreases
    assert found[0] == schedule.t_start and max(found) <= schedule.t_end


def test_not_adaptive_is_linear_in_time():
    schedule = TAIDSchedule(0.2, 0.8, adaptive=False)
    state = schedule.start()
    for step in range(1, 11):
        state = schedule.next(state, 3.0 / step, step / 10)
        assert state[0].item() == pytest.approx(0.2 + 0.06 * step, abs=1e-12)


def test_a_falling_loss_is_faster_than_a_rising_one_and_both_end_at_t_end():
    schedule = TAIDSchedule(alpha=0.05, beta=0.5)
    ends = []
    for losses in ([8.0, 4.0, 2.0, 1.0], [1.0, 2.0, 4.0, 8.0]):
        state = schedule.start()
        for loss in losses:
            state = schedule.next(state, loss, 0.0)
        ends.append(state[0].item())
        assert schedule.next(state, loss, 1.0)[0] == schedule.t_end
    assert ends[0] > ends[1] > schedule.t_start


def test_the_state_is_all_that_a_checkpoint_needs():
    schedule, losses = TAIDSchedule(alpha=0.1), [3.0, 2.0, 2.5, 1.0]
    state = schedule.start()
    for step, loss in enumerate(losses):
        state = schedule.next(torch.tensor(state.tolist(), dtype=state.dtype), loss, step / 10)  # saved and loaded
    assert state[0].item() == pytest.approx(loop(losses, 10, alpha=0.1)[-1], abs=0.2)
    straight = schedule.start()
    for step, loss in enumerate(losses):
        straight = schedule.next(straight, loss, step / 10)
    assert torch.equal(state, straight)


def test_errors():
    for options in (dict(t_start=-0.1), dict(t_start=0.9, t_end=0.5), dict(t_end=1.1)):
        with pytest.raises(ValueError, match="0 <= t_start <= t_end <= 1"):
            TAIDSchedule(**options)
    for options in (dict(alpha=-1), dict(beta=1.5)):
        with pytest.raises(ValueError, match="alpha must be at least 0 and beta"):
            TAIDSchedule(**options)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        TAID()(torch.zeros(2, 3), torch.zeros(2, 4), None, torch.zeros(2))

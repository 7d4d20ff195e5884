"""SinKD: the catalogue's checks, a float64 reference in loops, and how it adds up over ranks."""

import math

import numpy as np
import pytest
import torch

from mmkd.losses import SinKD, union_of_top

BAR = 2e-6


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(s, t, temperature=2.0, epsilon=0.1, iterations=20):
    """By the definition: costs, K, and each sum divided out in turn."""
    n = len(s)
    q, p = ([softmax(z / temperature) for z in x] for x in (s, t))
    cost = [[math.fsum(abs(a - b) for a, b in zip(q[i], p[j], strict=True)) for j in range(n)] for i in range(n)]
    plan = [[math.exp(-c / epsilon) for c in row] for row in cost]
    for _ in range(iterations):
        plan = [[x / sum(row) for x in row] for row in plan]
        sums = [sum(row[j] for row in plan) for j in range(n)]
        plan = [[x / sums[j] for j, x in enumerate(row)] for row in plan]
    return [math.fsum(k * c for k, c in zip(a, b, strict=True)) for a, b in zip(plan, cost, strict=True)], np.array(plan)


def draw(rows=7, vocabulary=40, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(rows)
    return tuple((scale * torch.randn(rows, vocabulary, generator=generator)).to(dtype) for _ in range(2))


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, epsilon=1.0), dict(epsilon=0.03, iterations=3)], ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(1, 40), (7, 2), (7, 40), (20, 500)])
def test_float32_against_float64_reference(rows, vocabulary, options):
    s, t = draw(rows, vocabulary, torch.float32)
    found = SinKD(**options)(s, t)
    assert found.dtype == torch.float32 and found.shape == (rows,)
    np.testing.assert_allclose(found.numpy(), reference(s.double().numpy(), t.double().numpy(), **options)[0], rtol=BAR)


def test_one_row_is_twice_the_total_variation():
    s, t = draw(1)
    distance = ((s / 2).softmax(-1) - (t / 2).softmax(-1)).abs().sum()
    torch.testing.assert_close(SinKD()(s, t), distance[None])


def test_equal_models_go_to_0_with_epsilon_and_not_before():
    s, _ = draw(6, scale=8.0)
    values = [SinKD(epsilon=epsilon)(s, s + 1).sum().item() for epsilon in (1.0, 0.1, 0.01, 1e-4)]
    assert values == sorted(values, reverse=True) and values[1] > 1e-6 and values[-1] < 1e-12


def test_columns_of_the_plan_sum_to_1():
    s, t = draw()
    cost = torch.cdist((s / 2).softmax(-1), (t / 2).softmax(-1), p=1.0)
    for iterations in (1, 20):
        plan = SinKD(iterations=iterations).plan(cost)
        torch.testing.assert_close(plan.sum(0), torch.ones(7, dtype=torch.float64))
        np.testing.assert_allclose(plan.numpy(), reference(s.numpy(), t.numpy(), iterations=iterations)[1], rtol=1e-9)
    torch.testing.assert_close(SinKD(iterations=2000).plan(cost).sum(1), torch.ones(7, dtype=torch.float64))


def test_small_epsilons_do_not_underflow():
    s, t = draw()
    assert SinKD(epsilon=1e-5)(s, t).isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient(temperature):
    s, t = draw(4, 6)
    loss = SinKD(temperature, epsilon=0.5, iterations=5)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.requires_grad_())
    plain = torch.cdist((s / temperature).softmax(-1), (t / temperature).softmax(-1), p=1.0)  # torch's own gradient
    expected = torch.autograd.grad((loss.plan(plain) * plain).sum(), s)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(s, t).sum(), s)[0], expected)


def test_a_detached_plan_gives_the_same_values_and_the_gradient_of_the_costs_alone():
    s, t = draw(4, 6)
    leaf = s.clone().requires_grad_()
    through, detached = SinKD()(leaf, t), SinKD(detach_plan=True)(leaf, t)
    torch.testing.assert_close(through, detached)
    plan = torch.from_numpy(reference(s.numpy(), t.numpy())[1])
    cost = torch.cdist((leaf / 2).softmax(-1), (t / 2).softmax(-1), p=1.0)
    to_cost = torch.autograd.grad((plan * cost).sum(), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(detached.sum(), leaf)[0], to_cost)
    assert not torch.allclose(torch.autograd.grad(through.sum(), leaf)[0], to_cost, rtol=1e-3)


def test_shifts_and_the_order_of_rows_change_nothing():
    s, t = draw()
    values = SinKD()(s, t)
    torch.testing.assert_close(SinKD()(s + 4, t - 7), values)
    order = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    torch.testing.assert_close(SinKD()(s[order], t[order]), values[order])
    torch.testing.assert_close(SinKD()(s, t[order]).sum(), values.sum())  # nothing pairs row i with row i


@pytest.mark.parametrize("detach_plan", [False, True])
def test_ranks_that_gather_all_rows_and_sum_their_own_add_up(detach_plan):
    s, t = draw(8)
    loss = SinKD(detach_plan=detach_plan)
    whole = s.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(whole, t).sum(), whole)
    total, found = 0.0, torch.zeros_like(s)
    for own in (slice(0, 3), slice(3, 8)):
        # A gather with gradient: what this rank wants of the rows of all. Without it a detached plan needs only its own.
        rows = s.clone().requires_grad_()
        gathered = rows if not detach_plan else torch.cat([rows[:3].detach(), rows[3:]] if own.start else
                                                          [rows[:3], rows[3:].detach()])  # fmt: skip
        share = loss(gathered, t)[own].sum()
        total, found = total + share.detach(), found + torch.autograd.grad(share, rows)[0]
    torch.testing.assert_close(total, loss(s, t).sum())
    torch.testing.assert_close(found, expected)


def test_union_of_top():
    logits = torch.tensor([[5.0, 4.0, 0.0, 1.0, 0.0], [0.0, 9.0, 0.0, 8.0, 0.0]])
    assert union_of_top(logits, 2).tolist() == [0, 1, 3]
    assert union_of_top(logits, 99).tolist() == [0, 1, 2, 3, 4]


def test_impossible_tokens_and_half_precision():
    s, t = draw()
    s[:, 3], t[:, 4] = -torch.inf, -torch.inf
    leaf = s.clone().requires_grad_()
    values = SinKD()(leaf, t)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert values.isfinite().all() and gradient.isfinite().all()
    half = s.bfloat16(), t.bfloat16()
    assert SinKD()(*half).dtype == torch.float32
    torch.testing.assert_close(SinKD()(*half), SinKD()(*(x.float() for x in half)))


def test_errors():
    with pytest.raises(ValueError, match="temperature is 0"):
        SinKD(temperature=0)
    for options in (dict(epsilon=0.0), dict(iterations=0)):
        with pytest.raises(ValueError, match="epsilon must be above 0, iterations at least 1"):
            SinKD(**options)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        SinKD()(torch.zeros(2, 3), torch.zeros(2, 4))

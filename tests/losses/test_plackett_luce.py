"""PLD: the catalogue's checks and a float64 reference that ranks one row at a time."""

import math

import pytest
import torch

from mmkd.losses import PLD, cross_entropy

BAR = 2e-6


def reference(z, t, label, k, temperature):
    """One row: choose the label among all, then the teacher's best among what is left, and so on for k ranks more."""
    order = [label, *sorted((v for v in range(len(t)) if v != label), key=lambda v: -t[v])]
    total = math.fsum(math.exp((x - max(t)) / temperature) for x in t)
    value = 0.0
    for rank, chosen in enumerate(order[: k + 1]):
        left = order[rank:]
        top = max(z[v] for v in left)
        log_all = top + math.log(math.fsum(math.exp(z[v] - top) for v in left))
        value += math.exp((t[chosen] - max(t)) / temperature) / total * (log_all - z[chosen])
    return value


def draw(rows=6, vocabulary=30, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return s.to(dtype), t.to(dtype), torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("vocabulary, k", [(2, 1), (30, 1), (30, 10), (30, 29), (30, 500), (900, 64)])
def test_float32_against_float64_reference(vocabulary, k, temperature):
    s, t, targets = draw(vocabulary=vocabulary, dtype=torch.float32)
    loss = PLD(k, temperature)
    for found in (loss(s, t, targets), loss.value_and_grad(s, t, targets)[0]):
        assert found.dtype == torch.float32
        rows = zip(found.tolist(), s.tolist(), t.tolist(), targets.tolist(), strict=True)
        for value, a, b, label in rows:
            expected = reference(a, b, label, k, temperature)
            assert abs(value - expected) <= BAR * expected


@pytest.mark.parametrize("k", [1, 10, 29])
def test_all_weight_on_the_label_is_the_cross_entropy(k):
    s, t, targets = draw()
    sure = t.scatter(-1, targets[:, None], 1e4)
    leaf = s.requires_grad_()
    found, expected = PLD(k)(leaf, sure, targets), cross_entropy(leaf, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf)[0] for x in (found, expected)))


def test_equal_weights_are_list_mle_over_the_number_of_classes():
    s, _, targets = draw()
    even = torch.zeros_like(s)  # ranked by index, after the label
    for row, (z, label) in enumerate(zip(s.tolist(), targets.tolist(), strict=True)):
        order = [label, *(v for v in range(30) if v != label)]
        list_mle = sum(math.log(sum(math.exp(z[v]) for v in order[i:])) - z[order[i]] for i in range(30))
        assert PLD(29)(s, even, targets)[row].item() == pytest.approx(list_mle / 30, rel=1e-12)


def test_convex_in_the_students_logits():
    s, t, targets = draw()
    other, _, _ = draw(seed=9)
    loss = PLD(12)
    for share in (0.1, 0.5, 0.8):
        between = loss(share * s + (1 - share) * other, t, targets)
        assert (between <= share * loss(s, t, targets) + (1 - share) * loss(other, t, targets) + 1e-12).all()
    hessian = torch.autograd.functional.hessian(lambda x: loss(x[None], t[:1], targets[:1]).sum(), s[0])
    assert torch.linalg.eigvalsh(hessian).min() > -1e-10


def test_a_student_in_the_same_order_with_large_gaps_costs_nothing():
    _, t, targets = draw()
    ranked = t.scatter(-1, targets[:, None], 1e3).argsort(-1, descending=True).argsort(-1)  # rank of each token
    for k in (5, 29):
        values, gradient = PLD(k).value_and_grad(-60.0 * ranked, t, targets)
        assert values.max() < 1e-20 and gradient.abs().max() < 1e-14
    assert (PLD(29)(60.0 * ranked, t, targets) > 60).all()


def test_a_smaller_k_only_leaves_out_terms_and_trains_all_logits():
    s, t, targets = draw()
    values = torch.stack([PLD(k)(s, t, targets) for k in (1, 5, 20, 29)])
    assert (values.diff(dim=0) > 0).all()
    assert (PLD(5).value_and_grad(s, t, targets)[1] != 0).all()


def test_ranks_of_equal_logits_and_of_few_finite_ones():
    t = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [-math.inf, -math.inf, 0.5, -math.inf, -math.inf]]).double()
    s, targets = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1])
    found = PLD(4)(s, t, targets)
    # `sorted` keeps equal ones in their order.
    assert found[0].item() == pytest.approx(reference(s[0].tolist(), t[0].tolist(), 0, 4, 1.0), rel=1e-12)
    # Row 1: the label has no weight; all of it is on token 2, chosen from what is left after the label.
    left = s[1, [0, 2, 3, 4]]
    torch.testing.assert_close(found[1], left.logsumexp(0) - s[1, 2])


def test_errors():
    with pytest.raises(ValueError, match="k is 0"):
        PLD(0)
    with pytest.raises(ValueError, match="temperature is 0"):
        PLD(temperature=0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        PLD()(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))

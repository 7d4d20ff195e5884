"""DPO and paired KTO with the teacher as reference."""

import math

import pytest
import torch

from mmkd.losses import dpo, kto_pair

F64 = torch.float64


def four(*rows):
    return [torch.tensor(r, dtype=F64) for r in rows]


FIRST = four([-12, -30.5], [-14, -29], [-13, -28], [-13.5, -30])
SECOND = four([-10, -20], [-15, -25], [-12, -21], [-14, -27.5])


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64), rtol=0, atol=tolerance)


def test_M5_dpo():
    close(dpo(*FIRST), [0.6209570478, 0.8833821554])
    close(dpo(*FIRST).mean(), 0.7521696016)
    close(dpo(*SECOND), [0.5543552445, 0.7709570478])
    close(dpo(*SECOND).mean(), 0.6626561461)
    chosen, rejected = 0.1 * (FIRST[0] - FIRST[2]), 0.1 * (FIRST[1] - FIRST[3])
    close(chosen, [0.10, -0.25])
    close(rejected, [-0.05, 0.10])
    assert (chosen > rejected).tolist() == [True, False]


def test_M6_kto_pair():
    close(kto_pair(*FIRST), [0.4812587841, 0.5683199835, 0.4875026035, 0.5249791875])
    close(kto_pair(*FIRST).mean(), 0.5155151396)
    close((FIRST[0] - FIRST[2]).mean().clamp(min=0), 0.0)  # KL+
    close((FIRST[1] - FIRST[3]).mean().clamp(min=0), 0.25)  # KL-
    close(kto_pair(*SECOND), [0.4687906266, 0.4937503255, 0.4378234991, 0.5249791875])
    close(kto_pair(*SECOND).mean(), 0.4813359097)


def test_label_smoothing_mixes_in_the_pairs_the_wrong_way_round():
    chosen, rejected, *teacher = FIRST
    turned = dpo(rejected, chosen, teacher[1], teacher[0])
    torch.testing.assert_close(dpo(*FIRST, label_smoothing=0.2), 0.8 * dpo(*FIRST) + 0.2 * turned)
    assert dpo(*FIRST, label_smoothing=0.2)[0] > dpo(*FIRST)[0]
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5; it must be at least 0 and below 0.5"):
        dpo(*FIRST, label_smoothing=0.5)


def test_kl_from_outside():
    kl = (torch.tensor(1.5, dtype=F64), torch.tensor(0.75, dtype=F64))
    torch.testing.assert_close(kto_pair(*SECOND, kl=kl), kto_pair(*SECOND))


@pytest.mark.parametrize("loss", [dpo, lambda *x: dpo(*x, label_smoothing=0.1), lambda *x: kto_pair(*x, detach_kl=False)])
def test_gradcheck(loss):
    chosen, rejected, *teacher = SECOND
    inputs = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *teacher), inputs)


def test_detached_kl_has_another_gradient_and_the_teacher_has_none():
    gradients = []
    for detach in (True, False):
        x = [t.clone().requires_grad_() for t in SECOND]
        kto_pair(*x, detach_kl=detach).sum().backward()
        assert x[2].grad is None and x[3].grad is None
        gradients.append(x[0].grad)
    assert not torch.allclose(*gradients)


def test_equal_models_and_extreme_values():
    same = FIRST[:2] + FIRST[:2]
    close(dpo(*same), [math.log(2)] * 2)
    close(kto_pair(*same), [0.5] * 4)
    huge = [x.float() for x in four([-1e4], [0], [0], [-1e4])]
    assert dpo(*huge).isfinite().all() and kto_pair(*huge).isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="must be"):
        dpo(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2))

"""Load balance of experts."""

import pytest
import torch

from mmkd.losses import load_balance

F64 = torch.float64
ROUTER = [[2.0, 1.0, 0.5, -1.0], [0.2, 1.5, 1.4, 0.0], [1.8, -0.3, 0.9, 0.4], [-0.6, 0.1, 0.3, 2.2]]


def router():
    return torch.tensor(ROUTER, dtype=F64)


def test_M2_load_balance():
    assert load_balance(router()).item() == pytest.approx(1.1194202725, abs=1e-10)
    gates = router().softmax(-1)
    assert gates.mean(0).tolist() == pytest.approx(
        [0.3329496301, 0.2004074470, 0.2135293575, 0.2531135654], abs=1e-10
    )


def test_mask_leaves_out_padding_whatever_it_holds():
    padded = torch.cat([router(), torch.full((2, 4), float("nan"), dtype=F64)])
    mask = torch.tensor([True] * 4 + [False] * 2)
    leaf = padded.requires_grad_()
    value = load_balance(leaf, mask)
    torch.testing.assert_close(value, load_balance(router()))
    clean = torch.cat([router(), torch.full((2, 4), 9.0, dtype=F64)])
    assert not torch.allclose(load_balance(clean), value)
    assert load_balance(router(), torch.zeros(4, dtype=torch.bool)) == 0


def test_even_is_one_and_the_worst_is_the_number_of_experts():
    even = 60 * torch.eye(5)
    assert load_balance(even).item() == pytest.approx(1.0)
    assert load_balance(even[:1].expand(7, 5)).item() == pytest.approx(5.0)


def test_gradcheck():
    assert torch.autograd.gradcheck(load_balance, router().requires_grad_())


def test_permutation_and_half_precision():
    torch.testing.assert_close(load_balance(router()[:, [2, 0, 3, 1]]), load_balance(router()[[3, 1, 0, 2]]))
    assert load_balance(router().bfloat16()).dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match=r"\[S, E\]"):
        load_balance(router(), torch.ones(3, dtype=torch.bool))

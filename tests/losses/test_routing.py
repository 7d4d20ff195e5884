"""Load balance of experts."""

import pytest
import torch

from mmkd.losses import choose_experts, cross_entropy, forward_kl, load_balance

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


def output(x, weights, experts):
    """What the tokens x become where expert e multiplies by e + 1."""
    return (weights * (experts + 1) * torch.tensor(x, dtype=F64)[:, None]).sum(-1)


def test_M2_gating():
    weights, experts = choose_experts(router())
    assert experts.T.tolist() == [[0, 1, 0, 3], [1, 2, 2, 2]]
    assert weights[:, 0].tolist() == pytest.approx([0.7310585786, 0.5249791875, 0.7109495026, 0.8698915256], abs=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=F64))
    expected = [1.2689414214, -4.9500416250, 0.7890504974, 11.6096745769]
    assert output([1, -2, 0.5, 3], weights, experts).tolist() == pytest.approx(expected, abs=1e-9)
    shares = [[float((experts[:, 0] == e).double().mean())] for e in range(4)]
    assert shares == [[0.5], [0.25], [0.0], [0.25]]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_M2_is_how_transformers_routes(kind):
    """The sparse students of this project are transformers' models: their routers give M2's experts and weights."""
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    keys = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "norm_topk_prob": True, "decoder_sparse_step": 1}
    config = AutoConfig.for_model(kind, **sizes, **keys, num_key_value_heads=1, head_dim=4, num_experts_per_tok=2)
    gate = AutoModel.from_config(config).layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.copy_(torch.eye(4))
    _, weights, experts = gate(router().float())
    ours, chosen = choose_experts(router())
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(weights.double(), ours, rtol=1e-6, atol=0)


def test_M3_capacity():
    # Expert 0 is everybody's first choice: as many are kept as it takes.
    favourite = router() + torch.tensor([9.0, 0, 0, 0], dtype=F64)
    for factor, capacity in ((0.5, 1), (1.0, 2), (1.5, 3)):
        weights, _ = choose_experts(favourite, capacity_factor=factor)
        assert (weights[:, 0] > 0).tolist() == [place < capacity for place in range(4)]
    weights, experts = choose_experts(router(), capacity_factor=0.5)
    assert (weights > 0).T.tolist() == [[True, True, False, True], [False, True, False, False]]
    assert weights[:, 0].tolist() == pytest.approx([1, 0.5249791875, 0, 1], abs=1e-10)
    assert weights[:, 1].tolist() == pytest.approx([0, 0.4750208125, 0, 0], abs=1e-10)
    assert output([1, -2, 0.5, 3], weights, experts).tolist() == pytest.approx([1.0, -4.9500416250, 0.0, 12.0], abs=1e-9)
    roomy, _ = choose_experts(router(), capacity_factor=0.5, min_capacity=4)
    assert torch.equal(roomy, choose_experts(router())[0])


def test_M4_total_and_what_the_released_code_makes_of_it():
    """It counts the balance twice, leaves out the shift, and takes the soft cross-entropy for its value."""
    t = torch.tensor([[0.3, 1.7, 0.1, -0.4], [-0.5, 0.2, 2.5, 0.9], [0.0, 0.6, -0.2, 1.8]], dtype=F64)
    s = torch.tensor([[0.6, 0.9, 0.2, 0.0], [0.1, 0.0, 1.2, 0.8], [0.5, 0.2, 0.1, 0.7]], dtype=F64)
    lm, balance = cross_entropy(s[:2], torch.tensor([2, 3])).mean(), load_balance(router())
    total = forward_kl(s[:2], t[:2]).mean() + lm + 0.01 * balance
    assert total.item() == pytest.approx(1.6353651380, abs=1e-9)
    soft = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)[1:].mean()
    assert (soft + lm + 0.02 * balance).item() == pytest.approx(2.6156012081, abs=1e-9)
    assert (total + 0.01 * balance).item() == pytest.approx(1.6465593407, abs=1e-9)  # the balance twice


def test_choices_are_checked():
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"top_k {wrong}"):
            choose_experts(router(), wrong)


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

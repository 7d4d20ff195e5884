"""Upcycling: the sparse tower computes what the dense one does, is a plain transformers model, and says what it is."""

import pytest
import torch
from tiny import language_config, tiny_samples, tiny_tokenizer, tiny_tower
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.errors import TowerError
from mmkd.towers.experts import recorded_routing, sparse_blocks
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import TARGETS, upcycle

TOKENIZER = tiny_tokenizer()
DEPTH, WIDTH = 3, 16
PAIRS = [
    ("qwen2", "qwen2_moe", "every-other"),
    ("qwen2", "qwen2_moe", "all"),
    ("qwen3", "qwen3_moe", "every-other"),
    ("qwen3", "qwen3_moe", [1]),
    ("llama", "mixtral", "all"),
    ("mistral", "mixtral", "all"),
]
NUMBERS = {"every-other": [0, 2], "all": [0, 1, 2]}


def dense_tower(kind: str, dtype=torch.float32, **changes):
    return tiny_tower(3, language=language_config(kind, WIDTH, DEPTH, **changes), tokenizer=TOKENIZER, dtype=dtype)


def hidden(tower, inputs):
    return tower.read(inputs, tower.see(inputs))[inputs.attention_mask.bool()]


def test_every_supported_family_is_tested():
    assert {dense for dense, _, _ in PAIRS} == set(TARGETS)


@pytest.mark.parametrize(("kind", "target", "layers"), PAIRS)
def test_M7_the_sparse_tower_computes_what_the_dense_one_does(kind, target, layers, tmp_path):
    dense = dense_tower(kind)
    before = dense.fingerprint()
    sparse, receipt = upcycle(dense, experts=4, top_k=2, layers=layers, seed=1)
    assert dense.fingerprint() == before
    assert sparse.model.config.text_config.model_type == target
    assert list(sparse_blocks(sparse)) == receipt.layers == (layers if isinstance(layers, list) else NUMBERS[layers])
    inputs = dense.prepare(tiny_samples(tmp_path, 3, text_only=1))
    with torch.no_grad():
        own, other = hidden(sparse, inputs), hidden(dense, inputs)
    assert (own - other).norm() / other.norm() <= 1e-5
    assert receipt.relative_difference <= 1e-5


@pytest.mark.parametrize(("kind", "target", "layers"), PAIRS[::2])
def test_saved_it_loads_with_transformers_alone(kind, target, layers, tmp_path):
    sparse, _ = upcycle(dense_tower(kind), layers=layers, seed=1)
    sparse.save(tmp_path / "model")
    model, facts = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = sparse.prepare(tiny_samples(tmp_path, 2))
    with torch.no_grad():
        logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
        own = sparse.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
    torch.testing.assert_close(logits, own, rtol=0, atol=0)
    assert processor.tokenizer.get_vocab() == sparse.tokenizer.get_vocab()
    assert Tower.load(tmp_path / "model").parameter_count() == sparse.parameter_count()


def test_answers_are_those_of_the_dense_tower(tmp_path):
    dense = dense_tower("llama")
    sparse, _ = upcycle(dense, layers="all")
    samples = tiny_samples(tmp_path, 3)
    assert sparse.answer(samples, max_new_tokens=5) == dense.answer(samples, max_new_tokens=5)


def test_experts_are_copies_and_routers_come_from_the_seed():
    dense = dense_tower("qwen3")
    one, again, other = (sparse_blocks(upcycle(dense, seed=seed)[0]) for seed in (5, 5, 6))
    for layer, block in one.items():
        mlp = dense.language.layers[layer].mlp
        gate, up = block.experts.gate_up_proj.chunk(2, dim=1)
        for expert in range(4):
            assert torch.equal(gate[expert], mlp.gate_proj.weight) and torch.equal(up[expert], mlp.up_proj.weight)
            assert torch.equal(block.experts.down_proj[expert], mlp.down_proj.weight)
        assert torch.equal(block.gate.weight, again[layer].gate.weight)
        assert not torch.equal(block.gate.weight, other[layer].gate.weight)
        assert block.gate.weight.abs().max() <= WIDTH**-0.5 and block.gate.weight.std() > 0.1 * WIDTH**-0.5
    assert not torch.equal(one[0].gate.weight, one[2].gate.weight)


@pytest.mark.parametrize(
    ("kind", "layers", "shared_gate"), [("qwen2", "every-other", WIDTH), ("qwen3", "every-other", 0), ("llama", "all", 0)]
)
def test_the_receipt_counts_parameters(kind, layers, shared_gate):
    dense = dense_tower(kind)
    experts, top_k = 5, 2
    sparse, receipt = upcycle(dense, experts=experts, top_k=top_k, layers=layers)
    mlp = 3 * WIDTH * 2 * WIDTH
    each = (experts - 1) * mlp + experts * WIDTH + shared_gate
    assert receipt.parameters_dense == sum(p.numel() for p in dense.model.parameters())
    assert receipt.parameters_total == receipt.parameters_dense + len(receipt.layers) * each
    assert receipt.parameters_active == receipt.parameters_total - len(receipt.layers) * (experts - top_k) * mlp
    assert sparse.parameter_count() == {"total": receipt.parameters_total, "active": receipt.parameters_active}
    assert dense.parameter_count()["active"] == receipt.parameters_dense
    assert (receipt.experts, receipt.top_k, list(receipt.use)) == (experts, top_k, receipt.layers)
    assert all(len(shares) == experts and sum(shares) == pytest.approx(1) for shares in receipt.use.values())
    text = "\n".join(receipt.lines())
    assert f"{receipt.parameters_total:,} sparse, {receipt.parameters_active:,} active" in text and receipt.target in text
    assert receipt.as_dict()["use"].keys() == {str(layer) for layer in receipt.layers}


def test_weights_that_do_not_add_up_to_one_change_the_output(tmp_path):
    """The wrong variant: routing weights as the softmax over all experts leaves them."""
    dense = dense_tower("qwen3")
    sparse, _ = upcycle(dense, layers="all")
    for block in sparse_blocks(sparse).values():
        block.gate.norm_topk_prob = False
    inputs = dense.prepare(tiny_samples(tmp_path, 2))
    with torch.no_grad():
        own, other = hidden(sparse, inputs), hidden(dense, inputs)
    assert (own - other).norm() / other.norm() > 1e-2


def test_a_shared_expert_adds_nothing_for_ever(tmp_path):
    sparse, _ = upcycle(dense_tower("qwen2"), layers="all")
    inputs = sparse.prepare(tiny_samples(tmp_path, 2))
    optimiser = torch.optim.AdamW(sparse.model.parameters(), lr=1e-2)
    for _ in range(2):
        hidden(sparse, inputs).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(sparse.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    block = sparse_blocks(sparse)[0]
    states = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    _, weights, chosen = block.gate(states)
    assert torch.equal(block(states)[0], block.experts(states[0], chosen, weights))
    assert sum(p.numel() for p in block.shared_expert.parameters()) == 0


@pytest.mark.parametrize("kind", list(TARGETS))
def test_gradient_reaches_routers_and_experts(kind, tmp_path):
    sparse, _ = upcycle(dense_tower(kind), experts=3, layers="all")
    inputs = sparse.prepare(tiny_samples(tmp_path, 4))
    blocks = sparse_blocks(sparse)

    def gradients():
        sparse.model.zero_grad()
        with recorded_routing(sparse) as routing:
            hidden(sparse, inputs)[:, :4].sum().backward()
        return routing

    gradients()
    for block in blocks.values():  # equal experts: no matter where a token goes
        assert block.gate.weight.grad.norm() < 1e-4 * block.experts.down_proj.grad.norm()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in blocks.values():
            block.experts.down_proj += 0.3 * torch.randn(block.experts.down_proj.shape, generator=generator)
    routing = gradients()
    for layer, block in blocks.items():
        assert block.gate.weight.grad.norm() > 1e-2 * block.experts.down_proj.grad.norm()
        used = routing[layer].tokens(torch.ones_like(routing[layer].chosen[:, 0], dtype=torch.bool)) > 0
        assert used.any() and torch.equal(block.experts.down_proj.grad.abs().sum((1, 2)) > 0, used)
        assert torch.equal(block.experts.gate_up_proj.grad.abs().sum((1, 2)) > 0, used)


def test_half_precision_keeps_its_dtype():
    sparse, receipt = upcycle(dense_tower("qwen2", dtype=torch.bfloat16), layers="all")
    assert {p.dtype for p in sparse.model.parameters()} == {torch.bfloat16}
    assert receipt.relative_difference < 5e-2


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("language", "options", "message"),
    [
        ({"kind": "smollm3"}, {}, "'smollm3' cannot be upcycled; supported: qwen2 .to qwen2_moe., qwen3"),
        ({"kind": "llama"}, {}, "sparse kin of llama, has experts in every layer, .* layers 0, 2 of 3 .* set layers to all"),
        ({"kind": "mistral"}, {"layers": [0]}, "sparse kin of mistral, has experts in every layer"),
        ({"kind": "llama", "mlp_bias": True}, {"layers": "all"}, "mixtral has no place for mlp_bias"),
        ({"kind": "qwen3", **WINDOW}, {}, "windowed attention in some of its layers only"),
        ({"kind": "qwen2"}, {"experts": 1, "top_k": 1}, "1 experts with 1 a token"),
        ({"kind": "qwen2"}, {"experts": 4, "top_k": 5}, "4 experts with 5 a token"),
        ({"kind": "qwen2"}, {"layers": [0, 3]}, r"layers \[0, 3\] must be different numbers from 0 to 2"),
        ({"kind": "qwen2"}, {"layers": [1, 1]}, "must be different numbers"),
        ({"kind": "qwen2"}, {"layers": []}, "at least one"),
        ({"kind": "qwen2"}, {"layers": "odd"}, "choose every-other, all"),
    ],
)
def test_what_cannot_be_is_refused(language, options, message):
    kind = language.pop("kind")
    with pytest.raises(TowerError, match=message):
        upcycle(dense_tower(kind, **language), **options)


def test_windowed_attention_in_some_layers_stays_in_qwen2(tmp_path):
    dense = dense_tower("qwen2", **WINDOW)
    sparse, receipt = upcycle(dense)
    assert sparse.model.config.text_config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert receipt.relative_difference <= 1e-5


def test_an_upcycled_tower_is_not_upcycled_again():
    sparse, _ = upcycle(dense_tower("qwen2"))
    with pytest.raises(TowerError, match="'qwen2_moe' cannot be upcycled"):
        upcycle(sparse)

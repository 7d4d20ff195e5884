"""Attention within windows, in groups of one size."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.tower import Tower
from mmkd.towers.windows import NAME, Windows, attend

RAGGED = [[1, 16, 16], [1, 18, 10], [1, 6, 22]]  # patches of pictures: windows that are whole and those cut at one edge or both


def test_each_window_attends_to_itself_alone():
    torch.manual_seed(0)
    borders = torch.tensor([0, 4, 6, 6, 10, 11, 13])  # an empty one, as a window at a picture's very edge may be
    q, k, v = (torch.randn(1, 3, 13, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found, _ = attend(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=borders)
    own = torch.repeat_interleave(torch.arange(6), borders.diff())
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None] == own[None, :], scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    grads = (torch.autograd.grad((x * x.detach().cos()).sum(), (q, k, v)) for x in (found, wanted))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_windows_of_one_size_are_not_moved():
    assert Windows.of(torch.tensor([0, 4, 8, 12])) == Windows([(3, 4)], None, None)
    found = Windows.of(torch.tensor([0, 4, 5, 9]))
    assert found.groups == [(1, 1), (2, 4)] and found.order.tolist() == [4, 0, 1, 2, 3, 5, 6, 7, 8]


def encoder_of(family):
    encoder = tiny_family(family).vision
    config = encoder.config
    assert any(block not in config.fullatt_block_indexes for block in range(len(encoder.blocks)))  # a layer with windows
    return encoder


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni_thinker"])
def test_visual_tokens_and_gradients_are_those_of_eager_attention(family):
    encoder, grid, found = encoder_of(family), torch.tensor(RAGGED), {}
    width = encoder.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(int(grid.prod(1).sum()), width, generator=torch.Generator().manual_seed(0))
    for way in ("eager", NAME):
        for block in encoder.blocks:
            block.attn.config = type(encoder.config).from_dict(encoder.config.to_dict(), attn_implementation=way)
        encoder.zero_grad()
        output = encoder(pixels, grid_thw=grid)
        tokens = output.pooler_output
        (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
        found[way] = [tokens.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]
    assert len(found[NAME]) == len(found["eager"]) > 10
    for grouped, eager in zip(found[NAME], found["eager"], strict=True):
        assert float((grouped - eager).abs().max()) <= 1e-5 * max(1.0, float(eager.abs().max()))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_the_loader_takes_it_unless_another_attention_is_asked_for(tmp_path, family):
    tiny_family(family).save(tmp_path)
    loaded, asked = Tower.load(tmp_path), Tower.load(tmp_path, attn_implementation="sdpa")
    has_windows = family == "qwen2_5_vl"
    assert ways_of(loaded) == {NAME if has_windows else "sdpa"} and ways_of(asked) == {"sdpa"}
    loaded.save(tmp_path / "again")  # which transformers alone reads as ever
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert NAME not in (tmp_path / "again" / "config.json").read_text()
    AutoModelForImageTextToText.from_config(copy.deepcopy(loaded.model.config))  # whose attention is transformers'


def ways_of(tower):
    return {block.attn.config._attn_implementation for block in tower.vision.blocks}


def test_a_layer_calls_torch_once_for_each_size_of_window(tmp_path, monkeypatch):
    tiny_family("qwen2_5_vl").save(tmp_path)
    encoder, sizes = Tower.load(tmp_path).vision, []
    attention = F.scaled_dot_product_attention

    def counted(query, *given, **more):
        sizes.append(query.shape)
        return attention(query, *given, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    grid = torch.tensor(RAGGED)
    encoder(torch.randn(int(grid.prod(1).sum()), encoder.patch_embed.proj.weight[0].numel()), grid_thw=grid)
    layers = len(encoder.blocks)
    windows = sum(-(-h // 8) * -(-w // 8) for _, h, w in RAGGED)
    assert len(sizes) < layers * windows / 2
    assert sum(s[0] * s[2] for s in sizes) == layers * int(grid.prod(1).sum())  # every patch in one window a layer

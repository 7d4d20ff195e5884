"""Encoders of all sources keep the contract, alone and inside a student."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VISIONS, tiny_samples, tiny_tower
from torch import nn

from mmkd.errors import RegistryError, TowerError
from mmkd.registry import register, registry
from mmkd.testing import check_encoder, check_tower
from mmkd.towers.assemble import VisionSpec, build_encoder
from mmkd.towers.encoders import EncoderConfig, WrappedEncoder, register_encoder


@register_encoder("tiny_conv")
class TinyConv(nn.Module):
    """A user's own encoder: gives a map [n, Dv, h, w] and keeps a buffer that no file holds."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Conv2d(width, width, 2, 2))
        self.register_buffer("shift", torch.arange(width, dtype=torch.float32), persistent=False)

    def forward(self, pixels):
        return self.layers(pixels) + self.shift[:, None, None]


@pytest.fixture(scope="module", autouse=True)
def open_clip_configs(tmp_path_factory):
    """Two small open_clip models: its own ViT and one whose picture half comes from timm."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    own = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    timm = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    for name, vision in {"tiny-own": own, "tiny-timm": timm}.items():
        content = json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})
        (folder / f"{name}.json").write_text(content, encoding="utf-8")
    open_clip.add_model_config(folder)


def wrapped(source: str, architecture: str, **arguments) -> dict:
    return {"model_type": "mmkd_encoder", "source": source, "architecture": architecture, "arguments": arguments}


SWIN = {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
# name -> (config, picture size, visual tokens of a picture)
ENCODERS = {
    **{name: (config, 16, 4) for name, config in VISIONS.items()},
    "swin": (
        {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
         "window_size": 4}, 32, 64,
    ),
    "timm convnext": (wrapped("timm", "convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 16, 16]), 64, 4),
    "timm resnet": (wrapped("timm", "resnet10t", channels=[8, 8, 16, 16], stem_width=8), 64, 4),
    "timm vit": (wrapped("timm", "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2), 32, 5),
    "timm swin": (wrapped("timm", "swin_tiny_patch4_window7_224", **SWIN), 32, 16),
    "open_clip": (wrapped("open_clip", "tiny-own"), 32, 16),
    "open_clip timm": (wrapped("open_clip", "tiny-timm"), 160, 101),
    "own module": (wrapped("module", "tiny_conv", width=12), 16, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_students_on_any_encoder_keep_the_contract(name, tmp_path):
    config, size, count = ENCODERS[name]
    tower = tiny_tower(vision=config, image_size=(size, size))
    samples = tiny_samples(tmp_path, 2, two_images=1, text_only=1)
    facts = check_tower(tower, samples)
    assert facts["visual tokens"] == 4 * count
    assert facts["largest difference from transformers' logits"] == facts["largest difference after loading"] == 0
    assert facts["visual switch"] == "yes"


@pytest.mark.parametrize("name", [n for n, (config, *_) in ENCODERS.items() if config["model_type"] == "mmkd_encoder"])
def test_wrapped_encoders_keep_the_contract_alone(name, tmp_path):
    config, size, count = ENCODERS[name]
    encoder = WrappedEncoder(EncoderConfig(image_size=(size, size), **{k: v for k, v in config.items() if k != "model_type"}))
    facts = check_encoder(encoder, size)
    assert facts["features of one picture"] == count
    encoder.save_pretrained(tmp_path)
    loaded = WrappedEncoder.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, size, size)
    torch.testing.assert_close(loaded(pixels).last_hidden_state, encoder.eval()(pixels).last_hidden_state)


def test_buffers_that_no_file_holds_are_there_after_loading(tmp_path):
    WrappedEncoder(EncoderConfig("module", "tiny_conv", {"width": 5})).save_pretrained(tmp_path)
    assert WrappedEncoder.from_pretrained(tmp_path).backbone.shift.tolist() == [0, 1, 2, 3, 4]


# ---- what check_encoder finds ----------------------------------------------------------------------------------------


class Noisy(TinyConv):
    def forward(self, pixels):
        return super().forward(pixels) + torch.randn(())


class Crowded(TinyConv):
    def forward(self, pixels):
        return super().forward(pixels - pixels.mean())


class Frozen(TinyConv):
    def forward(self, pixels):
        with torch.no_grad():
            return super().forward(pixels)


class Pooled(TinyConv):
    def forward(self, pixels):
        return super().forward(pixels).mean((2, 3))


class Constant(TinyConv):
    def forward(self, pixels):
        return super().forward(0 * pixels)


class Listed(TinyConv):
    def forward(self, pixels):
        return [super().forward(pixels)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Noisy, "determinism: the same pictures give features that differ"),
        (Crowded, "batches: a picture's features change"),
        (Frozen, "gradient: none of the encoder's parameters"),
        (Pooled, r"must give \[n, N, Dv\] or \[n, Dv, h, w\]; this one gives \[3, 8\]"),
        (Constant, "pixels: two different pictures give the same features"),
        (Listed, "not list"),
    ],
)
def test_check_encoder_finds(kind, message):
    with pytest.raises(TowerError, match=message):
        check_encoder(kind(), 16)


def test_check_encoder_gives_what_it_measured():
    encoder = TinyConv()
    facts = check_encoder(encoder, (16, 32))
    assert facts["features of one picture"] == 8 and facts["width"] == 8
    assert facts["parameters"] == facts["parameters with gradient"] == sum(p.numel() for p in encoder.parameters())
    assert encoder.training and all(p.grad is None for p in encoder.parameters())


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (wrapped("tim", "resnet10t"), "encoder source 'tim' is not one of timm, open_clip, module"),
        (wrapped("timm", "resnet10"), "timm has no 'resnet10'; close: resnet10"),
        (wrapped("timm", "resnet10t", chanels=[8]), "timm cannot build 'resnet10t' with .*chanels"),
        (wrapped("open_clip", "ViT-B-3"), "open_clip has no 'ViT-B-3'; close: ViT-B-32"),
        (wrapped("open_clip", "tiny-own", widht=3), "open_clip cannot build 'tiny-own' with .*widht"),
        (wrapped("module", "tiny_con"), "no encoder is registered as 'tiny_con'; did you mean 'tiny_conv'?"),
        (wrapped("module", "mine") | {"module": "no_such_module"}, "the module 'no_such_module' of the encoder 'mine'"),
        (wrapped("timm", "vit_tiny_patch16_224", depth=1), "does not take pictures of 16 x 16 pixels"),
        ({"model_type": "mmkd_encoder", "architectur": "x"}, "unknown key 'architectur'; did you mean 'architecture'?"),
    ],
)
def test_mistakes_are_answered_with_a_way_out(config, message):
    with pytest.raises(TowerError, match=message):
        tiny_tower(vision=config)


def test_a_taken_name_is_refused_and_the_same_class_is_not():
    assert register_encoder("tiny_conv")(TinyConv) is register("encoders", "tiny_conv")(TinyConv) is TinyConv
    assert registry("encoders").get("tiny_conv") is TinyConv and "conv" in registry("encoders")
    with pytest.raises(RegistryError, match=r"encoder 'tiny_conv' of .*Noisy is registered already, by .*TinyConv"):
        register_encoder("tiny_conv")(Noisy)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet10t", "timm:resnet10t"),
        ("ViT-B-32-quickgelu", "open_clip:ViT-B-32-quickgelu"),
        ("openai/clip-vit-base-patch32", "hf-hub:openai/clip-vit-base-patch32"),
        ("convnext_atom", "timm:convnext_atto"),
    ],
)
def test_a_bare_name_gets_the_prefix_it_may_mean(name, wanted):
    with pytest.raises(TowerError, match="no known prefix") as caught:
        build_encoder(VisionSpec(source=name))
    assert wanted in str(caught.value)

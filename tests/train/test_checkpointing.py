"""Gradient checkpointing works with every kind of encoder: the same gradients from fewer bytes."""

import json
import logging

import open_clip
import pytest
import torch
from tiny import language_config, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.errors import TowerError
from mmkd.testing.tiny_families import tiny_family
from mmkd.train.checkpointing import checkpoint_layers
from mmkd.train.spec import StageSpec
from mmkd.train.trainable import set_trainable

TOKENIZER = tiny_tokenizer()
HIERARCHY = {"image_size": 32, "embed_dim": 8, "depths": [1, 2]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
WRAPPED = {"model_type": "mmkd_encoder"}
VIT = {"embed_dim": 16, "num_heads": 2, "depth": 2}

# Encoder -> (configuration, side of its pictures, whether its own layers are checkpointed).
ENCODERS = {
    "focalnet": ({"model_type": "focalnet", **HIERARCHY, "focal_levels": [1, 1], "focal_windows": [3, 3]}, 32, True),
    "swin": ({"model_type": "swin", **HIERARCHY, "num_heads": [1, 2], "window_size": 2}, 32, True),
    "siglip": ({"model_type": "siglip_vision_model", **SMALL, "patch_size": 8, "vision_use_head": False}, 32, True),
    "timm vit": (WRAPPED | {"source": "timm", "architecture": "test_vit", "arguments": {**VIT, "img_size": 64}}, 64, True),
    "timm resnet": (WRAPPED | {"source": "timm", "architecture": "resnet10t",
                               "arguments": {"channels": [8, 8, 16, 16], "stem_width": 8}}, 64, True),
    "open_clip": (WRAPPED | {"source": "open_clip", "architecture": "checkpointed-tiny", "arguments": {}}, 32, True),
    "conv": (WRAPPED | {"architecture": "conv", "arguments": {}}, 32, False),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def open_clip_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    (folder / "checkpointed-tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)


def student_of(name):
    config, side, _ = ENCODERS[name]
    return tiny_tower(1, vision=config, image_size=(side, side), tokenizer=TOKENIZER, language=language_config(layers=4))


def step(student, samples):
    """Gradients by name, and bytes that autograd keeps."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    student.model.train()
    inputs = student.prepare(samples)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = student.read(inputs, student.see(inputs))[inputs.response].square().mean()
    loss.backward()
    weights = sum(p.numel() * p.element_size() for p in student.model.parameters())
    return {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}, sum(kept.values()) - weights


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_the_same_gradients_from_fewer_bytes(name, tmp_path, caplog):
    samples = tiny_samples(tmp_path, 2)
    plain, kept = step(student_of(name), samples)
    student = student_of(name)
    with caplog.at_level(logging.INFO):
        checkpoint_layers(student)
    assert ("has no layers that allow it" in caplog.text) == (not ENCODERS[name][2])
    again, fewer = step(student, samples)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-7)
    assert fewer < kept


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "mistral3"])
def test_other_families_too(family, tmp_path):
    samples = tiny_samples(tmp_path, 2)
    plain, kept = step(tiny_family(family), samples)
    student = tiny_family(family)
    checkpoint_layers(student)
    again, fewer = step(student, samples)
    assert plain.keys() == again.keys() and fewer < kept
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-7)


def test_frozen_parts_get_no_gradient_from_it(tmp_path):
    """transformers' own hook would make the outputs of frozen embeddings require one."""
    stage = {"data": [{"card": "a"}], "steps": 1, "terms": {"cross_entropy": 1}, "gradient_checkpointing": True}
    student = student_of("focalnet")
    set_trainable(student, StageSpec.model_validate(stage | {"train": ["language"]}))
    outputs = []
    student.vision.register_forward_hook(lambda module, given, output: outputs.append(output.last_hidden_state))
    gradients, _ = step(student, tiny_samples(tmp_path, 2))
    assert not outputs[0].requires_grad
    assert gradients and not [name for name in gradients if "vision_tower" in name]


def test_a_model_without_layers_to_checkpoint_is_refused(monkeypatch):
    student = student_of("conv")
    monkeypatch.setattr(type(student.model), "supports_gradient_checkpointing", False)
    with pytest.raises(TowerError, match=r"the vision encoder \(WrappedEncoder\) and the language model .* take it out"):
        checkpoint_layers(student)

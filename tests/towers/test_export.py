"""Saved students: the tensor names of published LLaVA folders, equal outputs in transformers, what engines refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VISIONS, language_config, tiny_samples, tiny_tokenizer, tiny_tower
from transformers import AutoModelForImageTextToText

from mmkd.towers.export import serving_remarks
from mmkd.towers.tower import Tower

# As in llava-hf/llava-1.5-7b-hf and its kin on the hub, by hand, for one layer of each half.
ENCODER_LAYER = [
    *(f"self_attn.{name}_proj.{kind}" for name in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *(f"{name}.{kind}" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")),
]
EMBEDDINGS = {
    "clip": ["class_embedding", "patch_embedding.weight", "position_embedding.weight"],
    "siglip": ["patch_embedding.weight", "patch_embedding.bias", "position_embedding.weight"],
}
NORMS = {"clip": ["pre_layrnorm", "post_layernorm"], "siglip": ["post_layernorm"]}
LANGUAGE = [
    "embed_tokens.weight", "norm.weight", "layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]  # fmt: skip


def published(vision: str, tied: bool) -> set[str]:
    encoder = [f"embeddings.{name}" for name in EMBEDDINGS[vision]]
    encoder += [f"{norm}.{kind}" for norm in NORMS[vision] for kind in ("weight", "bias")]
    encoder += [f"encoder.layers.0.{name}" for name in ENCODER_LAYER]
    names = {f"vision_tower.vision_model.{name}" for name in encoder}
    names |= {f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    names |= {f"language_model.model.{name}" for name in LANGUAGE}
    return names | (set() if tied else {"language_model.lm_head.weight"})


def one_layer(vision: str, **changes) -> Tower:
    return tiny_tower(vision={**VISIONS[vision], "num_hidden_layers": 1}, layers=1, feature_layer=-1, **changes)


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_student_is_saved_with_the_names_of_published_folders(vision, tied, tmp_path):
    tower = one_layer(vision, language=language_config("llama", layers=1, tie_word_embeddings=tied))
    tower.save(tmp_path / "model")
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == published(vision, tied)
    model, facts = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    inputs = tower.prepare(tiny_samples(tmp_path, 2))
    assert torch.equal(logits(model, inputs), logits(tower.model, inputs))


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_folders_without_the_prefix_load_and_are_saved_with_it(vision, tmp_path):
    tower = one_layer(vision)
    tower.save(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = {name.replace("vision_model.", ""): tensor for name, tensor in load_file(file).items()}
    assert "vision_tower.embeddings.patch_embedding.weight" in tensors
    save_file(tensors, file, metadata={"format": "pt"})
    old = Tower.load(tmp_path / "old")
    assert old.fingerprint() == tower.fingerprint()
    old.save(tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == published(vision, tied=True)
    assert Tower.load(tmp_path / "new").fingerprint() == tower.fingerprint()


def test_other_encoders_keep_their_names(tmp_path):
    tower = tiny_tower(vision="vit", layers=1)
    tower.save(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "vision_model" in name]


def test_a_sparse_student_has_them_too(tmp_path):
    from mmkd.towers.upcycle import upcycle

    upcycle(tiny_tower(vision="siglip", layers=1), layers="all")[0].save(tmp_path)
    encoder = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("vision_tower.")]
    assert encoder and all(name.startswith("vision_tower.vision_model.") for name in encoder)


def test_what_engines_refuse_is_said():
    narrow = serving_remarks(tiny_tower(vision="dinov2").model)
    assert len(narrow) == 2 and "8 wide" in narrow[0] and "'dinov2'" in narrow[1]
    wide = language_config("llama", width=64, layers=1)
    assert serving_remarks(tiny_tower(vision="siglip", language=wide, tokenizer=tiny_tokenizer()).model) == []

"""Students from parts: language models, layouts, pretrained parts, and what a wrong part is answered with."""

from __future__ import annotations

import pytest
import torch
from tiny import VISIONS, language_config, tiny_samples, tiny_tokenizer, tiny_tower
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor

from mmkd.errors import TowerError
from mmkd.testing import check_tower
from mmkd.towers.assemble import CLIP_MEAN, LanguageSpec, VisionSpec, assemble, train_tokenizer


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "smollm3"])
def test_any_language_model_of_the_llama_kind(kind, tmp_path):
    config = language_config(kind)
    if kind == "qwen2":
        del config["head_dim"]
    facts = check_tower(tiny_tower(language=config), tiny_samples(tmp_path, 2, text_only=1))
    assert facts["largest difference from transformers' logits"] == 0


def test_the_same_seed_gives_the_same_student_and_another_another():
    assert tiny_tower(seed=1).fingerprint() == tiny_tower(seed=1).fingerprint() != tiny_tower(seed=2).fingerprint()


def test_assembling_draws_no_number_of_the_caller():
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    tiny_tower(seed=5)
    assert torch.rand(()) == wanted


@pytest.mark.parametrize(
    ("vision", "strategy", "extra"), [("clip", "default", 1), ("vit", "default", 1), ("siglip", "full", 0)]
)
def test_a_class_token_is_dropped_where_there_is_one(vision, strategy, extra):
    tower = tiny_tower(vision=vision)
    assert tower.model.config.vision_feature_select_strategy == strategy
    assert tower.processor.num_additional_image_tokens == extra


def test_feature_layer_is_the_hidden_state_that_is_asked_for(tmp_path):
    inputs = tiny_tower().prepare(tiny_samples(tmp_path, 1))
    for layer in (1, -2, -1):
        tower = tiny_tower(feature_layer=layer)
        tower.model.eval()
        with torch.no_grad():
            states = tower.vision(inputs.pixels["pixel_values"], output_hidden_states=True).hidden_states
            torch.testing.assert_close(tower.see(inputs).features[0], states[layer][0, 1:])


def test_a_picture_that_is_not_square(tmp_path):
    tower = tiny_tower(vision="dinov2", image_size=(16, 32))
    assert check_tower(tower, tiny_samples(tmp_path, 2))["visual tokens"] == 2 * 2 * 4


def test_parts_with_weights_keep_them(tmp_path):
    """Folders of transformers: weights, tokenizer, and the pixel statistics that the encoder was trained with."""
    donor = tiny_tower(seed=7, vision="siglip")
    donor.vision.save_pretrained(tmp_path / "vision")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    CLIPImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path / "vision")
    language = AutoModelForCausalLM.from_config(donor.language.config)
    language.save_pretrained(tmp_path / "language")
    donor.tokenizer.save_pretrained(tmp_path / "language")

    tower = assemble(VisionSpec(source=f"local-dir:{tmp_path / 'vision'}"), LanguageSpec(source=str(tmp_path / "language")))
    for name, value in tower.language.state_dict().items():
        assert torch.equal(value, language.base_model.state_dict()[name])
    for name, value in tower.vision.state_dict().items():
        assert torch.equal(value, donor.vision.state_dict()[name])
    assert list(tower.processor.image_processor.image_mean) == mean
    assert list(tower.processor.image_processor.image_std) == std
    assert list(tiny_tower().processor.image_processor.image_mean) == CLIP_MEAN


def test_a_whole_clip_gives_its_vision_half(tmp_path):
    from transformers import CLIPConfig

    half = {k: v for k, v in VISIONS["clip"].items() if k != "model_type"}
    AutoModel.from_config(CLIPConfig(vision_config=half)).save_pretrained(tmp_path)
    tower = assemble(
        VisionSpec(source=f"local-dir:{tmp_path}"), LanguageSpec(config=language_config()), tokenizer=tiny_tokenizer()
    )
    assert tower.feature_width == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"model_type": "vitt"}}, "no vision model_type 'vitt'; close: vit"),
        ({"vision": {"hidden_size": 16}}, "lacks `model_type`"),
        ({"vision": {"model_type": "clip"}}, "its vision half is 'clip_vision_model'"),
        ({"vision": VISIONS["vit"] | {"hiden_size": 16}}, "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"vision": VISIONS["vit"] | {"hidden_size": "wide"}}, "expected int, got str"),
        ({"vision": {"model_type": "convnext", "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}}, r"not \[n, N, Dv\]"),
        ({"image_size": (32, 32)}, "does not take pictures of 32 x 32 pixels"),
        ({"feature_layer": -7}, "feature_layer -7 is not one of the 3 hidden states"),
        ({"language": {"model_type": "lama"}}, "no language model_type 'lama'; close: llama"),
        ({"language": {"hidden_size": 16}}, "lacks `model_type`"),
        ({"language": language_config(vocab_size=10)}, "has 10 embeddings, its tokenizer"),
        ({"language": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}}, "LLaVA cannot hold a GPT2LMHeadModel"),
        ({"language": language_config("cohere")}, "logit_scale 0.0625"),
        ({"projector": "mlp3"}, "no projector is registered as 'mlp3'; did you mean 'mlp'"),
    ],
)
def test_a_wrong_part_is_answered_with_a_way_out(changes, message):
    with pytest.raises(TowerError, match=message):
        tiny_tower(**changes)


def test_sources_that_are_wrong():
    language, tokenizer = LanguageSpec(config=language_config()), tiny_tokenizer()
    with pytest.raises(TowerError, match="has no known prefix; write hf-hub:NAME"):
        assemble(VisionSpec(source="openai/clip"), language, tokenizer=tokenizer)
    with pytest.raises(TowerError, match="either `source`"):
        assemble(VisionSpec(), language, tokenizer=tokenizer)
    with pytest.raises(TowerError, match="either `source`"):
        assemble(VisionSpec(config=VISIONS["vit"]), LanguageSpec(), tokenizer=tokenizer)
    with pytest.raises(TowerError, match="needs a tokenizer"):
        assemble(VisionSpec(config=VISIONS["vit"]), language)
    with pytest.raises(TowerError, match="no vision encoder can be loaded from 'local-dir:/no/such'"):
        assemble(VisionSpec(source="local-dir:/no/such"), language, tokenizer=tokenizer)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TowerError, match="no end-of-sequence token"):
        tiny_tower(tokenizer=tokenizer)


def test_trained_tokenizers_hold_every_character():
    tokenizer = train_tokenizer(["red round"], 320)
    text = "Größe 漢字 \U0001f600\n\t<x>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(TowerError, match="bytes and special tokens alone are"):
        train_tokenizer(["a"], 100)

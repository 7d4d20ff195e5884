"""Dual encoders of every source: unit vectors, padding, temperature, saving and loading with and without mmkd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from mmkd.errors import TowerError
from mmkd.retrieval.assemble import TextSpec, assemble_dual, build_text_encoder
from mmkd.retrieval.dual_encoders import OpenClipDual, TransformersDual, load_dual
from mmkd.retrieval.text_tokenizer import train_text_tokenizer
from mmkd.towers.assemble import VisionSpec

TEXTS = ("a red circle", "two blue squares and one green triangle", "nothing")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**SIZES, "image_size": 16, "patch_size": 8}
BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 32, "initializer_range": 0.3}
VISIONS = {
    "vit": {"model_type": "vit", **SQUARE},
    "clip": {"model_type": "clip_vision_model", **SQUARE},
    "conv": {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv", "arguments": {"widths": [8, 16]}},
    "focalnet": {"model_type": "focalnet", "image_size": 16, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1]},
}


def pictures(n: int = 3, seed: int = 0) -> list[Image.Image]:
    values = np.random.default_rng(seed).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def tokenizer():
    return train_text_tokenizer(TEXTS, 300)


def assembled(vision: str = "vit", seed: int = 0, text: dict | None = None) -> TransformersDual:
    spec = VisionSpec(config=dict(VISIONS[vision]), image_size=(16, 16))
    return assemble_dual(spec, TextSpec(config=dict(text or BERT)), embedding=8, tokenizer=tokenizer(), seed=seed)


def clip() -> TransformersDual:
    words = tokenizer()
    text = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=SQUARE, projection_dim=8))
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return TransformersDual(model, CLIPProcessor(images, words))


def siglip() -> TransformersDual:
    words = tokenizer()
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(words), "max_position_embeddings": 24, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=SQUARE))
    return TransformersDual(model, SiglipProcessor(SiglipImageProcessor(size={"height": 16, "width": 16}), words))


@pytest.fixture
def open_clip_name(monkeypatch):
    """A tiny architecture under a name of its own, as `open_clip.add_model_config` would add it."""
    from open_clip import factory

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    return "open_clip:tiny"


def embeddings(model):
    model.eval()
    with torch.no_grad():
        return model.embed_images(model.prepare_images(pictures())), model.embed_texts(model.prepare_texts(TEXTS))


def check_contract(model, width: int) -> None:
    images, texts = embeddings(model)
    assert images.shape == texts.shape == (3, width)
    for found in (images, texts):
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
        assert not torch.allclose(found[0], found[1], atol=1e-3), "all inputs look the same"
    with torch.no_grad():  # a text alone and in a batch with longer ones is the same
        alone = model.embed_texts(model.prepare_texts(TEXTS[2:]))
    torch.testing.assert_close(alone[0], texts[2], rtol=1e-4, atol=1e-5)
    model.set_temperature(0.05)
    assert model.temperature.item() == pytest.approx(0.05)
    model.set_temperature(2.0)
    model.clamp_temperature()
    assert model.temperature.item() == pytest.approx(0.5)
    (model.embed_images(model.prepare_images(pictures())) @ images.T / model.temperature).sum().backward()
    assert model.model.logit_scale.grad is not None


def check_round_trip(model, folder) -> None:
    expected = embeddings(model)
    model.save(folder)
    again = load_dual(folder, dtype="float32")
    assert again.fingerprint() == model.fingerprint()
    for found, wanted in zip(embeddings(again), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("vision", VISIONS)
def test_assembled_from_any_vision_encoder(vision, tmp_path):
    model = assembled(vision)
    check_contract(model, 8)
    check_round_trip(model, tmp_path)


@pytest.mark.parametrize("make", [clip, siglip])
def test_transformers_families(make, tmp_path):
    check_contract(make(), 8 if make is clip else 16)
    check_round_trip(make(), tmp_path)


def test_a_clip_text_encoder_pools_at_the_end_token(tmp_path):
    model = assembled(text={"model_type": "clip_text_model", **SIZES, "max_position_embeddings": 32})
    check_contract(model, 8)
    check_round_trip(model, tmp_path)


def test_saved_models_are_plain_transformers(tmp_path):
    dual = assembled("vit").eval()
    dual.save(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert type(model).__name__ == "VisionTextDualEncoderModel"
    with torch.no_grad():
        found = model(**processor(text=list(TEXTS), images=pictures(), return_tensors="pt", padding=True))
    images, texts = embeddings(dual)
    torch.testing.assert_close(found.logits_per_image, images @ texts.T / dual.temperature.detach(), rtol=1e-5, atol=1e-5)


def test_open_clip_by_name_and_folder(open_clip_name, tmp_path):
    import open_clip

    model = load_dual(open_clip_name, seed=1)
    assert isinstance(model, OpenClipDual)
    check_contract(model, 8)
    check_round_trip(model, tmp_path)
    plain, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    with torch.no_grad():
        found = plain.eval().encode_image(torch.stack([preprocess(p) for p in pictures()]), normalize=True)
    torch.testing.assert_close(found, embeddings(model)[0])


def test_weights_follow_from_the_seed(open_clip_name):
    for make in (lambda seed: assembled(seed=seed), lambda seed: load_dual(open_clip_name, seed=seed)):
        assert make(0).fingerprint() == make(0).fingerprint() != make(1).fingerprint()


def test_long_texts_are_cut():
    model = assembled()
    assert model.prepare_texts([TEXTS[1] * 20])["input_ids"].shape == (1, 32)


def test_the_tokenizer_marks_both_ends():
    words = tokenizer()
    ids = words("A Red circle")["input_ids"]
    assert ids == words("a red circle")["input_ids"] and ids[0] == words.cls_token_id and ids[-1] == words.eos_token_id
    assert words.decode(ids, skip_special_tokens=True).strip() == "a red circle"
    with pytest.raises(TowerError, match=r"vocab_size 100 .* 259"):
        train_text_tokenizer(TEXTS, 100)


def test_errors(tmp_path, open_clip_name):
    with pytest.raises(TowerError, match="no dual encoder can be loaded"):
        load_dual(tmp_path / "nothing")
    assembled().model.text_model.save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(TowerError, match=r"BertModel .* is no dual encoder"):
        load_dual(tmp_path / "bert")
    with pytest.raises(TowerError, match=r"no model 'tyny'; close: tiny"):
        load_dual("open_clip:tyny")
    with pytest.raises(TowerError, match=r"no weights 'laion' of 'tiny'"):
        load_dual("open_clip:tiny/laion")
    with pytest.raises(TowerError, match="lacks `model_type`"):
        assembled(text={"hidden_size": 16})
    with pytest.raises(TowerError, match="gives no pooled output"):
        assembled(text={"model_type": "llama", **SIZES})
    with pytest.raises(TowerError, match="needs a tokenizer"):
        assemble_dual(VisionSpec(config=dict(VISIONS["vit"])), TextSpec(config=BERT))


# ---- a bag of words --------------------------------------------------------------------------------------------------

BAG = {"model_type": "mmkd_bag_of_words", "hidden_size": 16}


@pytest.fixture(scope="module")
def words():
    return train_text_tokenizer(TEXTS, 100, words=True)


def test_words_are_cut_at_signs_and_underscores(words):
    tokenizer = train_text_tokenizer(["keycap: 10", "grinning_face", "Grinning cat"], 50, words=True)
    assert tokenizer.tokenize("KEYCAP: 10 grinning_cat") == ["keycap", ":", "10", "grinning", "cat"]
    ids = tokenizer("grinning dog")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.eos_token_id
    assert ids[2] == tokenizer.pad_token_id, "an unknown word is padding"
    few = train_text_tokenizer(["a a a b"], 4, words=True)
    assert few.tokenize("a b") == ["a", few.pad_token], "only the most frequent words are kept"


def test_a_bag_is_the_mean_of_its_words(words):
    torch.manual_seed(0)
    bag = build_text_encoder(TextSpec(config=BAG), words)
    batch = words(["red circle", "one green triangle and two"], padding=True, return_tensors="pt")
    pooled = bag(**batch).pooler_output.double()
    table = bag.embeddings.weight.double()
    for row, text in enumerate((["red", "circle"], ["one", "green", "triangle", "and", "two"])):
        mean = table[words.convert_tokens_to_ids(text)].mean(0)
        expected = bag.output.weight.double() @ mean + bag.output.bias.double()
        torch.testing.assert_close(pooled[row], expected, rtol=1e-6, atol=1e-6)
    order = bag(**words(["circle red"], return_tensors="pt")).pooler_output
    torch.testing.assert_close(order[0].double(), pooled[0])
    unknown = bag(**words(["dodecahedron"], return_tensors="pt")).pooler_output
    torch.testing.assert_close(unknown[0], bag.output.bias)


def test_a_dual_encoder_on_it_keeps_the_contract(tmp_path):
    model = assembled("conv", text=BAG)
    check_contract(model, 8)
    check_round_trip(model, tmp_path / "dual")


# ---- a sentence encoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of a text encoder with dropout and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = tokenizer()
    torch.manual_seed(0)
    BertModel(BertConfig(**{**BERT, "hidden_dropout_prob": 0.5}, vocab_size=len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sentence(folder, frozen: bool) -> TransformersDual:
    vision = VisionSpec(config=dict(VISIONS["conv"]), image_size=(16, 16))
    return assemble_dual(vision, TextSpec(source=str(folder), pooling="mean", frozen=frozen), embedding=8)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_sentence_is_the_mean_of_its_states(pretrained, frozen):
    model = sentence(pretrained, frozen).eval()
    words = model.processor.tokenizer
    reference = BertModel.from_pretrained(pretrained).double().eval()
    for texts in (TEXTS, TEXTS[:1], TEXTS[::-1]):  # met before, with other neighbours
        with torch.no_grad():
            pooled = model.model.text_model(**words(texts, padding=True, return_tensors="pt")).pooler_output.double()
            for row, text in zip(pooled, texts, strict=True):
                mean = reference(**words([text], return_tensors="pt")).last_hidden_state[0].mean(0)
                torch.testing.assert_close(row, mean / mean.square().mean().sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_dual_encoder_on_a_sentence_encoder_keeps_the_contract(pretrained, frozen, tmp_path):
    model = sentence(pretrained, frozen).eval()
    check_contract(model, 8)
    check_round_trip(model, tmp_path / "dual")
    assert load_dual(tmp_path / "dual").model.text_model.config.frozen == frozen


def test_a_frozen_one_is_not_trained_and_reads_a_text_once(pretrained, monkeypatch):
    model = sentence(pretrained, frozen=True).train()
    encoder = model.model.text_model.encoder
    lengths = []
    monkeypatch.setattr(encoder, "forward", spy(encoder.forward, lengths))
    first = model.embed_texts(model.prepare_texts(TEXTS))
    second = model.embed_texts(model.prepare_texts([TEXTS[0], "two new squares", TEXTS[2]]))
    assert lengths == [3, 1], "only the new text is read again"
    torch.testing.assert_close(first[[0, 2]], second[[0, 2]], msg="training switches its dropout on")
    first.sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert bool(model.model.text_projection.weight.grad.any())
    other = sentence(pretrained, frozen=True).model.state_dict()
    model.model.load_state_dict({name: -value if "encoder" in name else value for name, value in other.items()})
    model.embed_texts(model.prepare_texts(TEXTS))
    assert lengths == [3, 1, 3], "other weights, other states"


def test_one_that_is_trained_gets_gradients(pretrained):
    model = sentence(pretrained, frozen=False).train()
    model.embed_texts(model.prepare_texts(TEXTS)).sum().backward()
    assert bool(model.model.text_model.encoder.embeddings.word_embeddings.weight.grad.any())


def spy(forward, lengths: list[int]):
    def called(input_ids, **options):
        lengths.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    return called


def test_a_frozen_one_needs_the_mean(pretrained):
    with pytest.raises(TowerError, match="set its pooling to mean"):
        assemble_dual(VisionSpec(config=dict(VISIONS["conv"]), image_size=(16, 16)), TextSpec(str(pretrained), frozen=True))

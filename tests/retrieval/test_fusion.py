"""The fusion cross-encoder: its start, its joint reading, its training, its folder; and augmentation."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_picture
from transformers import BertConfig, BertModel

from mmkd.errors import TowerError
from mmkd.retrieval.augment import shift_and_scale
from mmkd.retrieval.batches import PixelCache
from mmkd.retrieval.cross_encoders import FusionEncoder, load_matching
from mmkd.retrieval.matching import MatchingDataset, MatchingModel
from mmkd.retrieval.models import build_fusion
from mmkd.retrieval.pairs import PairSet, pair_set
from mmkd.retrieval.recipe import FusionSpec
from mmkd.retrieval.text_tokenizer import train_text_tokenizer

TEXTS = ("red circle", "a green square left of a blue one", "star", "cross")
CONV = {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv"}
SPEC = {
    "vision": {"config": CONV | {"arguments": {"widths": [8, 16], "norm": "batch"}}, "image_size": 16},
    "text": {"config": {"model_type": "mmkd_bag_of_words", "hidden_size": 12}, "vocab_size": 50, "tokenizer": "words"},
    "embedding": 8,
}


def fusion(**options) -> FusionEncoder:
    return build_fusion(FusionSpec(**{**SPEC, **options}), TEXTS, seed=0)


@pytest.fixture
def pairs(tmp_path) -> PairSet:
    refs = [tiny_picture(tmp_path, f"{n}.png", n, (16, 16)) for n in range(len(TEXTS))]
    return pair_set(list(zip(refs, TEXTS, strict=True)))


def everything(teacher: FusionEncoder, pairs: PairSet) -> torch.Tensor:
    count = len(TEXTS)
    numbers = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    return teacher.scores(pairs.images, pairs.texts, numbers, batch_size=3).reshape(count, count)


def test_it_starts_as_its_dual_encoder(pairs):
    teacher = fusion().freeze()
    cosines = teacher.similarities(teacher.see(pairs.images), teacher.tokens(TEXTS))
    expected = (teacher.model.dual.logit_scale.exp() * cosines).sigmoid()
    torch.testing.assert_close(everything(teacher, pairs), expected, rtol=1e-4, atol=1e-6)


def stirred() -> FusionEncoder:
    """One whose correction is not zero."""
    teacher = fusion().freeze()
    torch.manual_seed(1)
    torch.nn.init.normal_(teacher.model.correction[-1].weight)
    return teacher


def test_a_trained_one_reads_picture_and_text_together(pairs):
    """No sum or product of two embeddings gives its scores: the correction's second differences do not vanish."""
    teacher = stirred()
    cosines = teacher.similarities(teacher.see(pairs.images), teacher.tokens(TEXTS))
    rest = everything(teacher, pairs).logit() - teacher.model.dual.logit_scale.exp() * cosines
    mixed = rest[0, 0] - rest[0, 1] - rest[1, 0] + rest[1, 1]
    assert mixed.abs() > 1e-3


def test_its_folder_gives_it_back(pairs, tmp_path):
    teacher = stirred()
    teacher.save(tmp_path / "model")
    again = load_matching(tmp_path / "model", torch.float32).freeze()
    assert isinstance(again, FusionEncoder)
    assert again.fingerprint() == load_matching(tmp_path / "model", torch.float32).fingerprint()
    assert torch.equal(everything(again, pairs), everything(teacher, pairs))


def test_training_reaches_every_part_and_lowers_the_loss(pairs):
    encoder = fusion(dropout=0.0)
    model = MatchingModel(encoder, pairs, negatives=2).train()
    batch = MatchingDataset(pairs, encoder).collate([(n, n) for n in range(len(TEXTS))])["batch"]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        loss, _ = model(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_it_reads_a_frozen_sentence_encoder(pairs, tmp_path):
    words = train_text_tokenizer(TEXTS, 50, words=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, vocab_size=len(words), max_position_embeddings=32)).save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    encoder = fusion(text={"source": str(tmp_path / "bert"), "pooling": "mean", "frozen": True})
    model = MatchingModel(encoder, pairs, negatives=1).train()
    batch = MatchingDataset(pairs, encoder).collate([(n, n) for n in range(len(TEXTS))])["batch"]
    model(batch)[0].backward()
    beneath = "model.dual.text_model.encoder."
    assert all((p.grad is None) == name.startswith(beneath) for name, p in model.named_parameters())
    encoder.freeze().save(tmp_path / "model")
    again = load_matching(tmp_path / "model", torch.float32).freeze()
    saved, loaded = encoder.model.state_dict(), again.model.state_dict()
    assert list(saved) == list(loaded) and all(torch.equal(saved[name], loaded[name]) for name in saved)
    # Where weights lie in memory moves the last bit of a product on some processors.
    torch.testing.assert_close(everything(again, pairs), everything(encoder, pairs), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(TowerError, match="embedding 10 does not divide over 4 heads"):
        fusion(embedding=10)
    with pytest.raises(TowerError, match="norm 'layer' of a conv encoder is not one of group, batch"):
        fusion(vision={"config": CONV | {"arguments": {"norm": "layer"}}, "image_size": 16})


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_shifts_and_scalings_stay_in_their_bounds():
    """A picture whose value is its column shows where each column came from."""
    columns = torch.arange(32.0).expand(64, 3, 32, 32)
    torch.manual_seed(0)
    assert torch.allclose(shift_and_scale(columns, 0.0, 0.0), columns, atol=1e-4)
    moved = shift_and_scale(columns, 0.1, 0.0)[:, 0, 16, 8:24] - columns[:, 0, 16, 8:24]  # [64, 16]
    assert moved.abs().max() <= 3.2 + 1e-3 and moved.abs().max() > 2.5
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-3)
    scaled = shift_and_scale(columns, 0.0, 0.2)[:, 0, 16, 8:24].diff(dim=-1)  # 1 / factor
    assert scaled.min() > 1 / 1.2 - 1e-3 and scaled.max() < 1 / 0.8 + 1e-3 and scaled.std() > 0.05


def test_prepared_pictures_are_kept_and_keep_their_order(pairs, monkeypatch):
    asked = []

    def prepare(refs):
        asked.append([ref.key for ref in refs])
        return {"pixels": torch.stack([torch.full((3, 2, 2), float(pairs.images.index(ref))) for ref in refs])}

    cache = PixelCache(pairs.images, prepare)
    assert cache([2, 0, 2])["pixels"][:, 0, 0, 0].tolist() == [2, 0, 2]
    assert cache([0, 1, 2])["pixels"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert [len(keys) for keys in asked] == [2, 1]
    monkeypatch.setattr("mmkd.retrieval.batches.PIXEL_BYTES", 0)
    full = PixelCache(pairs.images, prepare)
    assert torch.equal(full([1, 3])["pixels"], full([1, 3])["pixels"]) and len(asked) == 4

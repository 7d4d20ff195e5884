"""Projectors with fewer visual tokens: the contract, the counts, where their weights belong, and what is refused."""

import pytest
import torch
from tiny import VISIONS, tiny_samples, tiny_tower
from transformers import AutoConfig, AutoModel

from mmkd.errors import TowerError
from mmkd.testing import check_tower
from mmkd.towers.reducers import REDUCERS, AveragePool, PixelShuffle, ReducedEncoder, ReducedEncoderConfig

CONV = {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv", "arguments": {"widths": [8, 16]}}
COUNTS = {"average_pool": 4, "pixel_shuffle": 4, "ldp": 4, "resampler": 3}  # of 16 features, by factor 2 and 3 queries


@pytest.mark.parametrize("encoder", ["clip", "conv"])
@pytest.mark.parametrize("kind", REDUCERS)
def test_students_with_fewer_tokens_keep_the_contract(kind, encoder, tmp_path):
    config = CONV if encoder == "conv" else VISIONS["clip"] | {"image_size": 16, "patch_size": 4}
    options = {"queries": 3} if kind == "resampler" else {"factor": 2}
    student = tiny_tower(vision=config, image_size=(16, 16), projector=kind, projector_options=options)
    facts = check_tower(student, tiny_samples(tmp_path, 2, two_images=1, text_only=1))
    assert facts["visual tokens"] == 4 * COUNTS[kind]
    assert facts["largest difference after loading"] == 0 and facts["visual switch"] == "yes"


def test_what_a_reducer_trains_is_of_the_projector():
    parts = tiny_tower(vision="siglip", projector="resampler", projector_options={"queries": 3}).part_parameters()
    assert any("reducer.queries" in name for name, _ in parts["projector"])
    assert not any("reducer" in name for part in ("vision", "language") for name, _ in parts[part])


def test_squares_are_brought_together():
    grid = torch.arange(16.0).reshape(1, 16, 1)  # 4 x 4 features that say where they are
    torch.testing.assert_close(AveragePool(1, 2, 0)(grid).flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))
    shuffled = PixelShuffle(1, 2, 0)(grid)[0]
    assert sorted(shuffled[0].tolist()) == [0, 1, 4, 5] and shuffled.shape == (4, 4)


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(TowerError, match="no square whose side 3 divides"):
        tiny_tower(projector="average_pool", projector_options={"factor": 3})
    with pytest.raises(TowerError, match="projector_options has no 'faktor'"):
        tiny_tower(projector="average_pool", projector_options={"faktor": 3})


def test_the_encoder_keeps_the_attention_that_it_was_built_with():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("vit", **sizes, image_size=16, patch_size=4)
    encoder = AutoModel.from_config(config, attn_implementation="eager")
    reduced = ReducedEncoder(ReducedEncoderConfig(encoder.config), encoder)
    assert encoder.config._attn_implementation == reduced.config.encoder._attn_implementation == "eager"

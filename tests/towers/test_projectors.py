"""Projectors with fewer visual tokens: the contract, the counts, where their weights belong, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import VISIONS, tiny_samples, tiny_tower
from transformers import AutoConfig, AutoModel

from mmkd.errors import TowerError
from mmkd.registry import registry
from mmkd.testing import check_tower
from mmkd.towers.encoders import ReducedEncoder, ReducedEncoderConfig
from mmkd.towers.projectors.reducers import AveragePool, PixelShuffle
from mmkd.towers.tower import Tower

CONV = {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv", "arguments": {"widths": [8, 16]}}
COUNTS = {"average_pool": 4, "pixel_shuffle": 4, "ldp": 4, "resampler": 3}  # of 16 features, by factor 2 and 3 queries


@pytest.mark.parametrize("encoder", ["clip", "conv"])
@pytest.mark.parametrize("kind", COUNTS)
def test_students_with_fewer_tokens_keep_the_contract(kind, encoder, tmp_path):
    config = CONV if encoder == "conv" else VISIONS["clip"] | {"image_size": 16, "patch_size": 4}
    options = {"queries": 3} if kind == "resampler" else {"factor": 2}
    student = tiny_tower(vision=config, image_size=(16, 16), projector=kind, projector_options=options)
    facts = check_tower(student, tiny_samples(tmp_path, 2, two_images=1, text_only=1))
    assert facts["visual tokens"] == 4 * COUNTS[kind]
    assert facts["largest difference after loading"] == 0 and facts["visual switch"] == "yes"


def test_every_projector_is_registered_and_tested():
    assert {*COUNTS, "mlp", "linear"} == set(registry("projectors"))
    about = registry("projectors").about("resampler")
    assert about.source == "mmkd.towers.projectors.reducers:Resampler" and about.options == ("queries",)


def test_models_that_were_saved_by_an_earlier_version_load(tmp_path):
    """Their configuration lacks what projectors of one's own need."""
    student = tiny_tower(vision="siglip", projector="resampler", projector_options={"queries": 3})
    student.save(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vision = content["vision_config"]
    assert vision.pop("options") == {} and vision.pop("module") is None
    assert vision["reducer"] == "resampler" and vision["queries"] == 3 and vision["factor"] == 2
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded = Tower.load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in student.model.state_dict().items())


OWN = """
from mmkd.registry import register
from mmkd.towers.projectors import Projector


@register("projectors", "every_nth")
class EveryNth(Projector):
    def __init__(self, width: int, step: int = 2):
        super().__init__()
        self.step, self.width = step, width

    def forward(self, features):
        return features[:, :: self.step]
"""
LOAD = """
import sys
import torch
import mmkd.towers.encoders
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
torch.manual_seed(0)
pixels = torch.randn(1, 3, 16, 16)
torch.save(model.get_image_features(pixels).pooler_output[0].detach(), sys.argv[2])
"""


def test_a_projector_of_ones_own_is_found_by_whoever_loads_the_student(tmp_path, monkeypatch):
    (tmp_path / "my_projector.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("my_projector")
    try:
        config = VISIONS["clip"] | {"image_size": 16, "patch_size": 4}
        student = tiny_tower(vision=config, image_size=(16, 16), projector="every_nth", projector_options={"step": 3})
        assert check_tower(student, tiny_samples(tmp_path / "pictures", 2))["visual tokens"] == 2 * 6
    finally:
        registry("projectors").remove("every_nth")
        del sys.modules["my_projector"]
    student.save(tmp_path / "student")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [tmp_path, root]))}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "student"), str(tmp_path / "tokens.pt")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    torch.manual_seed(0)
    own = student.model.eval().get_image_features(torch.randn(1, 3, 16, 16)).pooler_output[0]
    torch.testing.assert_close(torch.load(tmp_path / "tokens.pt"), own)


def test_what_a_reducer_trains_is_of_the_projector():
    parts = tiny_tower(vision="siglip", projector="resampler", projector_options={"queries": 3}).part_parameters()
    assert any("reducer.queries" in name for name, _ in parts["projector"])
    assert not any("reducer" in name for part in ("vision", "language") for name, _ in parts[part])


def test_squares_are_brought_together():
    grid = torch.arange(16.0).reshape(1, 16, 1)  # 4 x 4 features that say where they are
    torch.testing.assert_close(AveragePool(1, factor=2)(grid).flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))
    shuffled = PixelShuffle(1, factor=2)(grid)[0]
    assert sorted(shuffled[0].tolist()) == [0, 1, 4, 5] and shuffled.shape == (4, 4)


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(TowerError, match="no square whose side 3 divides"):
        tiny_tower(projector="average_pool", projector_options={"factor": 3})
    with pytest.raises(TowerError, match="projector_options has no 'faktor'"):
        tiny_tower(projector="average_pool", projector_options={"faktor": 3})
    with pytest.raises(TowerError, match="projector_options has no 'queries' for 'average_pool', which has factor"):
        tiny_tower(projector="average_pool", projector_options={"queries": 3})
    with pytest.raises(TowerError, match="projector_options has no 'factor' for 'mlp', which has none"):
        tiny_tower(projector="mlp", projector_options={"factor": 3})
    with pytest.raises(TowerError, match="no projector is registered as 'average_pol'; did you mean 'average_pool'"):
        tiny_tower(projector="average_pol")


def test_the_encoder_keeps_the_attention_that_it_was_built_with():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("vit", **sizes, image_size=16, patch_size=4)
    encoder = AutoModel.from_config(config, attn_implementation="eager")
    reduced = ReducedEncoder(ReducedEncoderConfig(encoder.config), encoder)
    assert encoder.config._attn_implementation == reduced.config.encoder._attn_implementation == "eager"

"""Pretrained folders are whole or refused, with the tensors' names."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import language_config, tiny_tower
from transformers import AutoModel, CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from mmkd.errors import TowerError
from mmkd.towers.assemble import VisionSpec, build_encoder
from mmkd.towers.tower import Tower
from mmkd.towers.whole import load_whole

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_tower(0).save(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def change(folder, how):
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


PROJECTOR = "multi_modal_projector.linear_1.weight"


def missing(tensors):
    for name in [name for name in tensors if "multi_modal_projector" in name]:
        del tensors[name]


def misshapen(tensors):
    name = next(name for name in tensors if name.endswith(PROJECTOR))
    tensors[name] = torch.zeros(3, 5)


def surplus(tensors):
    name = next(name for name in tensors if ".layers.1." in name)
    tensors |= {other.replace(".layers.1.", ".layers.7."): t.clone() for other, t in tensors.items() if ".layers.1." in other}
    assert name


def poisoned(value):
    def how(tensors):
        tensors[next(name for name in tensors if name.endswith(PROJECTOR))][0, 0] = value

    return how


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (missing, r"4 tensors are missing: .*multi_modal_projector"),
        (misshapen, r"1 have other shapes: .*linear_1\.weight \[3, 5\] instead of \[16, 16\]"),
        (surplus, r"have no place in the model: .*layers\.7\."),
        (poisoned(float("nan")), r"weights that are not finite: .*linear_1\.weight"),
        (poisoned(float("-inf")), r"weights that are not finite"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(model, how, said):
    change(model, how)
    with pytest.raises(TowerError, match=said) as caught:
        Tower.load(model)
    assert len(str(caught.value).splitlines()) == 1


def test_half_precision_is_finite_too_or_refused(model):
    change(model, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    Tower.load(model)
    change(model, poisoned(float("inf")))
    with pytest.raises(TowerError, match="not finite"):
        Tower.load(model)


def test_a_tied_head_is_not_missing_and_an_untied_one_is(tmp_path):
    for tied, name in ((True, "tied"), (False, "untied")):
        tower = tiny_tower(0, language=language_config(tie_word_embeddings=tied))
        tower.save(tmp_path / name)
        again = Tower.load(tmp_path / name)
        assert torch.equal(again.head.weight, tower.head.weight)
    change(tmp_path / "untied", lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with pytest.raises(TowerError, match=r"1 tensors are missing: .*lm_head\.weight"):
        Tower.load(tmp_path / "untied")


def index(folder, files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_outside_is_refused(model, name):
    (model.parent / "outside.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    index(model, {key: name for key in load_file(model / "model.safetensors")})
    (model / "model.safetensors").unlink()
    with pytest.raises(TowerError, match="names files outside its folder"):
        Tower.load(model)


INDEXES = ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": [1]}}', '{"weight_map": {"a": "gone.safetensors"}}']


@pytest.mark.parametrize("text", INDEXES)
def test_a_damaged_index_is_one_line(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TowerError, match=r"model\.safetensors\.index\.json"):
        Tower.load(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("damage", [lambda old: old[: len(old) // 2], lambda old: b"", lambda old: b"\xff\x00" * 9])
def test_cut_and_binary_files_are_one_line(model, name, damage):
    if not (model / name).exists():
        pytest.skip(f"this version writes no {name}")
    (model / name).write_bytes(damage((model / name).read_bytes()))
    with pytest.raises(TowerError) as caught:
        Tower.load(model)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_an_encoder_may_come_from_a_larger_model_but_not_from_half_of_itself(tmp_path):
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 50}, vision_config={**SMALL, "image_size": 16, "patch_size": 8}
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    assert type(build_encoder(VisionSpec(source=f"local-dir:{tmp_path / 'clip'}"))).__name__.startswith("CLIPVision")
    classifier = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8))
    classifier.save_pretrained(tmp_path / "vit")
    build_encoder(VisionSpec(source=f"local-dir:{tmp_path / 'vit'}"))  # its head is left, a pooler it has none
    with pytest.raises(TowerError, match=r"missing: pooler\."):
        load_whole(AutoModel, tmp_path / "vit", "encoder", part=True, pooled=True)
    change(tmp_path / "vit", lambda tensors: tensors.pop(next(name for name in tensors if ".1." in name)))
    with pytest.raises(TowerError, match=r"is not the whole of a vision encoder \(ViTModel\): 1 tensors are missing"):
        build_encoder(VisionSpec(source=f"local-dir:{tmp_path / 'vit'}"))


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/folder", "./student", "runs/gone", "a/b/c", "~/student"])
def test_a_folder_that_is_not_there_is_told_at_once(tmp_path, monkeypatch, name):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)  # asking would fail
    with pytest.raises(TowerError, match=f"no image-text model can be loaded from '{name}': there is no folder {name} here"):
        Tower.load(name)


def test_the_hub_is_asked_once_for_an_id(tmp_path, monkeypatch):
    asked = []

    def refuse(self, name, timeout):
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    for _ in range(2):
        with pytest.raises(TowerError, match="there is no folder some-lab/some-vlm here .*Name or service not known"):
            Tower.load("some-lab/some-vlm")
    assert asked == ["some-lab/some-vlm"]

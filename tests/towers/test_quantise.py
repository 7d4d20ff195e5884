"""Weights in few bits: formats against their definitions, gradients, students that keep what was quantised."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_samples, tiny_tower
from torch import nn

from mmkd.cli import main
from mmkd.errors import RecipeError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.sample.sample_set import write_sample_set
from mmkd.towers.quantise import FORMATS, FakeQuantisedLinear, fake_quantise, matrices, settle
from mmkd.towers.tower import Tower


def by_definition(weight: torch.Tensor, name: str) -> torch.Tensor:
    """llama.cpp's q4_0 and q8_0, block by block, weight by weight."""
    found = weight.clone()
    for row in found:
        for start in range(0, len(row), 32):
            block = [np.float32(x) for x in row[start : start + 32].tolist()]
            largest = max(block, key=abs)  # the first of equal ones
            scale = largest / np.float32(-8) if name == "q4_0" else np.float32(abs(largest)) / np.float32(127)
            steps = np.float32(0) if scale == 0 else np.float32(1) / scale
            for place, x in enumerate(block):
                if name == "q4_0":
                    code = min(15, int(float(x) * float(steps) + 8.5)) - 8
                else:
                    product = x * steps
                    code = int(math.copysign(math.floor(abs(product) + np.float32(0.5)), product))
                row[start + place] = float(np.float32(code) * np.float32(np.float16(scale)))
    return found


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_formats_of_llama_cpp_are_their_definitions(name):
    weight = drawn(0, 6, 96)
    weight[1, :32] = 0.0
    weight[2, 3], weight[2, 9] = 0.7, -0.7  # equal sizes of both signs: the first gives the scale
    assert torch.equal(FORMATS[name].round(weight), by_definition(weight, name))


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_formats_of_llama_cpp_are_those_of_its_package(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    kind = gguf.GGMLQuantizationType[name.upper()]
    weight = drawn(1, 64, 256)
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert np.array_equal(FORMATS[name].round(weight).numpy(), stored)


@pytest.mark.parametrize("name", [*FORMATS])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_what_was_stored_once_is_stored_again_unchanged(name, scale):
    once = FORMATS[name].round(drawn(2, 32, 128) * scale)
    assert torch.equal(FORMATS[name].round(once), once)
    assert len(once.unique()) < 16 * 128 or name == "q8_0"  # at most 16 of each block of 32


def test_gradients_pass_the_rounding():
    layer = nn.Linear(32, 8)
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight.copy_(by_definition(layer.weight, "q4_0"))
    FakeQuantisedLinear.within(layer, "q4_0")
    inputs = drawn(3, 5, 32)
    for one in (layer, rounded):
        one(inputs).square().sum().backward()
    assert torch.allclose(layer.weight.grad, rounded.weight.grad, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(inputs), rounded(inputs))
        layer.weight.data.mul_(2.0)  # an optimiser that writes past autograd
    assert torch.allclose(layer(inputs), 2 * nn.functional.linear(inputs, rounded.weight) + rounded.bias, atol=1e-5)


@pytest.mark.parametrize("parts", [["language"], ["vision"], ["vision", "projector", "language"]])
def test_only_matrices_of_these_parts_are_quantised(parts):
    tower = tiny_tower(1, width=32, vision="siglip")
    before = {name: p.clone() for name, p in tower.model.named_parameters()}
    wide = {f"{name}.weight" for name, layer in matrices(tower, parts) if layer.in_features % 32 == 0}
    found = fake_quantise(tower, "q4_0", parts)
    assert found.layers == len(wide) and {*dict(tower.model.named_parameters())} == {*before}
    settle(tower)
    changed = {name for name, p in tower.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == wide
    assert not any(isinstance(m, FakeQuantisedLinear) for m in tower.model.modules())
    of_part = {name for part in parts for name, _ in tower.part_parameters()[part]}
    assert changed <= of_part and not any("lm_head" in name or "embed" in name for name in changed)


def test_a_settled_tower_answers_as_it_was_trained(tmp_path):
    tower = tiny_tower(2, width=32)
    tower.model.eval()
    inputs = tower.prepare(tiny_samples(tmp_path))
    fake_quantise(tower, "q4_0", ["language"])
    with torch.no_grad():
        trained = tower.read(inputs, tower.see(inputs).tokens)
        settle(tower)
        assert torch.equal(tower.read(inputs, tower.see(inputs).tokens), trained)
        settle(tower)
        assert torch.equal(tower.read(inputs, tower.see(inputs).tokens), trained)


def test_a_student_in_nf4_loads_in_four_bits_as_it_is(tmp_path):
    tower = tiny_tower(3, width=64)
    fake_quantise(tower, "nf4", ["language"])
    settle(tower)
    tower.save(tmp_path / "student")
    packed = Tower.load(tmp_path / "student", quantise="4bit")
    layers = {name: m for name, m in packed.model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == len(list(matrices(tower, ["language"])))
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in layers.items():
        whole = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.allclose(whole.float(), tower.model.get_submodule(name).weight, atol=0, rtol=4e-3), name  # bfloat16


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    write_sample_set(folder / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(5, 32).save(folder / "teacher")
    tiny_tower(6, 32).save(folder / "student")
    stage = {
        "data": [{"card": "sample_textvqa"}], "steps": 4, "save_every": 2, "optimiser": {"batch_size": 4, "learning_rate": 1e-3},
        "terms": {"cross_entropy": 1.0, "kl": {"kind": "topkld", "k": 5}}, "quantise": "q4_0",
    }
    content = {
        "title": "t", "output": str(folder / "out"), "data_root": str(folder / "sample"), "max_length": 512,
        "teacher": {"model": str(folder / "teacher")}, "student": {"model": str(folder / "student")}, "stages": {"few": stage},
        "controls": ["equal_steps"], "evaluation": {"benchmarks": ["sample_textvqa"], "limit": 6},
        "guards": {"teacher_is_better": False, "pixels_matter": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def test_a_run_leaves_students_that_quantising_does_not_change(recipe, capsys, caplog):
    assert main(["distill", str(recipe)]) == 0
    out = recipe.parent / "out"
    started = load_file(recipe.parent / "student" / "model.safetensors")
    for role in ("student", "control"):
        weights = load_file(out / role / "model.safetensors")
        held = [name for name, w in weights.items() if w.dim() == 2 and torch.equal(FORMATS["q4_0"].round(w), w)]
        assert len(held) == 14 and not any(torch.equal(weights[name], started[name]) for name in held), role
    said = (out / "student" / "README.md").read_text(encoding="utf-8")
    assert "Through weights in q4\\_0" in said
    before = json.loads((out / "summary.json").read_text())["benchmarks"]["sample_textvqa"]["student"]
    arguments = ["--benchmarks", "sample_textvqa", "--data-root", str(recipe.parent / "sample"), "--limit", "6"]
    found = recipe.parent / "scored"
    assert main(["evaluate", str(out / "student"), *arguments, "--quantise", "q4_0", "--output", str(found)]) == 0
    assert json.loads((found / "sample_textvqa" / "results.json").read_text())["score"] == before


def test_what_cannot_be_quantised_is_said_before_training(recipe, tmp_path, capsys):
    tiny_tower(7, 8).save(tmp_path / "narrow")
    assert main(["distill", str(recipe), f"student.model={tmp_path / 'narrow'}", f"output={tmp_path / 'out'}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "stages.few.quantise: no matrix of language can be q4_0: 32 does not divide the rows of" in said and "take nf4" in said
    raw = yaml.safe_load(recipe.read_text())
    raw["stages"]["few"]["lora"] = {"rank": 2}
    with pytest.raises(RecipeError, match="take `lora` or `upcycle` out of the stage"):
        validate(raw, "t", Recipe)

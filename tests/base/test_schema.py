"""Numbers that no computation can use are refused wherever they stand."""

import pytest

from mmkd.errors import RecipeError
from mmkd.recipes.reading import load_recipe

BASE = """
title: t
output: o
student:
  assemble:
    vision: {config: {model_type: vit, hidden_size: 16}, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
    language: {source: some/model}
teacher: {model: some/teacher}
stages:
  sft:
    data: [{format: jsonl}]
    steps: 5
    terms: {cross_entropy: 1, kl: {kind: forward_kl, temperature: 2}}
    sampler: {kind: shuffle}
"""
S, V = "stages.sft", "student.assemble.vision"
WRONG = [
    f"{S}.terms.kl.weight=.nan", f"{S}.terms.kl.weight=.inf", f"{S}.terms.cross_entropy=.nan",
    f"{S}.terms.kl.temperature=.nan", f"{S}.terms.kl.temperature=-.inf", f"{S}.terms.kl.weight={{start: 0, end: .inf}}",
    f"{S}.optimiser.learning_rate=.nan", f"{S}.optimiser.learning_rate=.inf", f"{S}.optimiser.weight_decay=.nan",
    f"{S}.optimiser.betas=[0.9, .nan]", f"{S}.optimiser.learning_rates={{vision: .nan}}",
    f"{S}.optimiser.max_grad_norm=.nan", f"{S}.lora={{alpha: .inf}}", f"{S}.epochs=.inf", f"{S}.data.0.weight=.nan",
    f"{S}.answers={{data: .nan}}", f"{V}.std=[0.5, .nan, 0.5]", f"{V}.mean=[.inf, 0, 0]", f"{V}.config.layer_norm_eps=.nan",
    f"{V}.config.nested={{a: [1, .nan]}}", "guards.max_skipped_images=.nan",
    "student.assemble.projector_options={factor: .nan}",
    # and what is beyond any use
    "seed=-1", "seed=4294967296", f"{S}.optimiser.betas=[2, 2]", f"{S}.optimiser.betas=[0.9, 1]", f"{S}.data.0.weight=1e9",
    "workers=100000", f"{S}.optimiser.learning_rate=1e300", f"{V}.std=[0, 0.5, 0.5]", f"{S}.steps=1e30",
    f"{V}.config.hidden_size=1{'0' * 30}", f"{S}.optimiser.batch_size=99999999999", f"{V}.image_size=0",
    f"{V}.image_size=[16, -1]", f"{S}.epochs=1e300", "max_length=1e18",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "recipe.yaml"
    path.write_text(BASE)
    load_recipe(path)
    return path


@pytest.mark.parametrize("override", WRONG)
def test_a_number_that_nothing_can_be_computed_with_is_refused_by_key(path, override):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    key = override.partition("=")[0].replace("data.0.", "").rpartition(".")[2]
    assert key in str(caught.value) or override.partition("=")[0].split(".")[-2] in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_a_projector_without_a_side_is_refused(path):
    with pytest.raises(RecipeError, match=r"projector_options\.factor is 0; it must be above 0"):
        load_recipe(path, ["student.assemble.projector=average_pool", "student.assemble.projector_options={factor: 0}"])


@pytest.mark.parametrize("name", ["a/b", "..", "x" * 200, ""])
def test_a_stage_is_a_folders_name(path, name):
    text = BASE.replace("  sft:", f'  "{name}":')
    (path.parent / "named.yaml").write_text(text)
    with pytest.raises(RecipeError, match="names a folder"):
        load_recipe(path.parent / "named.yaml")


def test_a_thousand_errors_are_a_page(path):
    (path.parent / "many.yaml").write_text(BASE + "".join(f"unknown_{n}: {'x' * 500}\n" for n in range(300)))
    with pytest.raises(RecipeError, match="has 300 errors") as caught:
        load_recipe(path.parent / "many.yaml")
    assert len(str(caught.value).splitlines()) <= 20

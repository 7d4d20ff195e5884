"""Stages that end at their plateau on a validation split, and the control that is chosen there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_tower

from mmkd.errors import DataError, RecipeError
from mmkd.recipes.reading import load_recipe
from mmkd.runs import control, plateau
from mmkd.runs.control import train_controls
from mmkd.runs.run import check_benchmarks, distill
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student
from mmkd.runs.tuned import tuned, with_values
from mmkd.sample.sample_set import write_sample_set

VISION = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 64, "patch_size": 16, "hidden_dropout_prob": 0.1,
}  # fmt: skip
UNTIL = "stages.sft.until={kind: plateau, every: 2, patience: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plateau")
    write_sample_set(root / "sample", sizes={"train": 8, "val": 2, "test": 2})
    tiny_tower(3, vision=VISION, image_size=(64, 64)).save(root / "student")
    return root


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    stage = {
        "data": [{"card": "sample_textvqa"}], "terms": {"cross_entropy": 1.0}, "steps": 12, "log_every": 2, "save_every": 3,
        "optimiser": {"batch_size": 4, "learning_rate": 1e-2},
    }  # fmt: skip
    content = {
        "title": "t", "output": str(tmp_path / "run"), "data_root": str(folder / "sample"), "controls": [],
        "student": {"model": str(folder / "student")}, "stages": {"sft": stage},
        "evaluation": {"benchmarks": ["sample_textvqa"], "validation": {"split": "val", "limit": 2}},
        "guards": {"pixels_matter": False},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def scores_are(monkeypatch, values: list[float]) -> list[int]:
    """Validation scores in the order in which they are asked for."""
    asked: list[int] = []

    def scored(recipe, tower, folder, name, *, resume=False):
        asked.append(int(name.removeprefix("step ")))
        return {"sample_textvqa_val": values[asked[-1] // 2 - 1]}

    monkeypatch.setattr(plateau, "validation_scores", scored)
    return asked


def trained(path: Path, run: Path, *overrides: str) -> dict[str, torch.Tensor]:
    found = load_recipe(path, [*overrides])
    train(found, "student", build_student(found, None, []), None, run)
    return load_file(run / "student" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_stage_ends_after_scores_that_are_no_better_and_keeps_the_best(recipe, tmp_path, monkeypatch):
    asked = scores_are(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.9, 0.9])
    weights = trained(recipe, tmp_path / "a", UNTIL)
    assert asked == [2, 4, 6, 8]  # the second 0.3 is not above the first
    facts = json.loads((tmp_path / "a/stages/student/0_sft/plateau.json").read_text())
    assert facts == {"steps": 8, "best": 4, "score": 0.3, "reached": True}
    assert plateau.plateau_facts(tmp_path / "a", "student") == {"sft": facts}
    assert not list((tmp_path / "a").rglob("best.*")) and not list((tmp_path / "a").rglob("checkpoint-*"))
    # With the same scores but a best at step 8 the weights are others: the best ones are what is kept.
    scores_are(monkeypatch, [0.1, 0.2, 0.2, 0.4, 0.3, 0.3])
    assert not same(weights, trained(recipe, tmp_path / "b", UNTIL))


def test_scoring_on_validation_changes_no_bit_of_a_stage_that_goes_on_to_its_end(recipe, tmp_path):
    plain = trained(recipe, tmp_path / "plain", "stages.sft.steps=4")
    found = load_recipe(recipe, ["stages.sft.steps=4", "stages.sft.until={kind: plateau, every: 4}"])
    train(found, "student", build_student(found, None, []), None, tmp_path / "until")
    assert same(plain, load_file(tmp_path / "until" / "student" / "model.safetensors"))
    rows = [json.loads(line) for line in (tmp_path / "until/log/student.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "score sample_textvqa_val" in row] == [4]
    asked = json.loads((tmp_path / "until/during/student/sft/validation/000004/sample_textvqa_val/results.json").read_text())
    assert asked["split"] == "val" and asked["rows"] == 2


def test_the_last_step_is_scored_too(recipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plateau, "validation_scores", lambda *a, **k: asked.append(a[3]) or {"x": float(len(asked))})
    trained(recipe, tmp_path / "a", "stages.sft.steps=5", "stages.sft.until={kind: plateau, every: 2}")
    assert asked == ["step 2", "step 4", "step 5"]


def test_stopped_and_gone_on_with_it_ends_as_undisturbed(recipe, tmp_path, monkeypatch):
    values = [0.1, 0.3, 0.2, 0.3, 0.9, 0.9]
    scores_are(monkeypatch, values)
    whole = trained(recipe, tmp_path / "whole", UNTIL)
    asked: list[int] = []

    def dies(recipe, tower, folder, name, *, resume=False):
        asked.append(int(name.removeprefix("step ")))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"x": values[asked[-1] // 2 - 1]}

    monkeypatch.setattr(plateau, "validation_scores", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "stopped", UNTIL)
    assert asked == [2, 4, 6, 8]
    again = scores_are(monkeypatch, values)
    assert same(whole, trained(recipe, tmp_path / "stopped", UNTIL))
    assert again == [8]  # from the checkpoint of step 6 on; what was scored before it is remembered


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.sft.until=plateau"], "how often is it scored"),
        ([UNTIL, "evaluation.validation=null"], "chosen on a validation split"),
        ([UNTIL, "evaluation.benchmarks=[]"], "chosen on a validation split"),
        (["stages.sft.until=platoo"], "platoo"),
        (["stages.sft.until={kind: plateau, patience: 0}"], "patience"),
        (["controls={c: {kind: equal_steps, stages: {sft: {until: plateau}}}}"], "controls.c.stages.sft.until"),
        (["controls=[tuned]", "evaluation.validation=null"], "controls.tuned"),
        (["controls={c: {kind: equal_steps, tries: {rates: [1]}}}"], "only a control of kind `tuned`"),
        (["controls={c: {kind: tuned, tries: {rates: []}}}"], "rates"),
    ],
)
def test_choosing_without_a_validation_split_is_refused(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


def test_short_forms(recipe):
    found = load_recipe(recipe, ["stages.sft.until=plateau", "evaluation.every=3", "evaluation.validation=val"])
    assert found.stages["sft"].until.patience == 3 and found.evaluation.validation.split == "val"


def test_the_split_of_the_scores_is_no_validation_split(recipe):
    with pytest.raises(DataError, match="scored on its split 'test'"):
        check_benchmarks(load_recipe(recipe, ["evaluation.validation=test"]))


def test_a_validation_split_that_is_not_there_is_found_before_training(recipe):
    with pytest.raises(DataError):
        check_benchmarks(load_recipe(recipe, ["evaluation.validation=dev"]))


# ---- tuned -----------------------------------------------------------------------------------------------------------


def test_the_best_value_of_each_is_taken_on_validation(recipe):
    own = load_recipe(recipe, ["controls={c: {kind: tuned, tries: {rates: [1, 2, 0.5], label_smoothing: [0, 0.2]}}}"])
    best = {(1, 0, None): 0.3, (2, 0, None): 0.5, (0.5, 0, None): 0.2, (2, 0.2, None): 0.4, (2, 0, "majority"): 0.6}
    seen = []

    def values_of(found):
        stage = found.stages["sft"]
        smoothing = (stage.terms["cross_entropy"].model_extra or {}).get("label_smoothing", 0)
        return stage.optimiser.learning_rate / 1e-2, smoothing, stage.data[0].target

    def learn(found):
        seen.append(values_of(found))
        return None, {"seconds": 1.0}

    chosen, facts = tuned(own, own.controls["c"].tries, learn, lambda found, tower: best[values_of(found)])
    assert seen == list(best) and values_of(chosen) == (2, 0, "majority")
    assert facts["chosen"] == {"rate": 2, "label_smoothing": 0, "target": "majority"}
    assert [one["validation"] for one in facts["tried"]] == list(best.values())


def test_a_choice_of_labels_that_changes_none_is_not_trained(recipe, tmp_path, folder):
    data = tmp_path / "one"
    data.mkdir()
    (data / "train.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    own = load_recipe(recipe, ["controls={c: {kind: tuned, tries: {rates: [1], label_smoothing: [0]}}}"])
    entry = own.stages["sft"].data[0].model_copy(update={"card": None, "format": "jsonl", "root": str(data), "text_only": True})
    own = own.model_copy(update={"stages": {"sft": own.stages["sft"].model_copy(update={"data": [entry]})}})
    tried = []
    tuned(own, own.controls["c"].tries, lambda found: (tried.append(1), {"seconds": 0})[::1], lambda found, tower: 0.5)
    assert tried == [1]


def test_rates_by_part_are_multiplied_too(recipe):
    own = load_recipe(recipe, ["stages.sft.optimiser.learning_rates={vision: 1e-3}"])
    stage = with_values(own, {"rate": 2.0, "label_smoothing": 0.1, "target": None}).stages["sft"]
    assert stage.optimiser.learning_rates == {"vision": 2e-3} and stage.terms["cross_entropy"].build("x").label_smoothing == 0.1


def test_a_run_with_a_tuned_control_tells_what_was_tried(recipe, folder, tmp_path):
    overrides = [
        f"teacher.model={folder / 'student'}", "stages.sft.terms={cross_entropy: 1.0, forward_kl: 1.0}", "stages.sft.steps=2",
        "controls={tuned: {kind: tuned, tries: {rates: [1, 0.5], label_smoothing: [0], targets: [null]}}}",
        "guards.teacher_is_better=false", "evaluation.limit=2",
    ]  # fmt: skip
    summary = distill(load_recipe(recipe, overrides))
    found = summary["benchmarks"]["sample_textvqa"]["controls"]["tuned"]["tuned"]
    assert [one["rate"] for one in found["tried"]] == [1.0, 0.5] and found["chosen"]["rate"] in (1.0, 0.5)
    assert (tmp_path / "run" / "control_tuned" / "model.safetensors").exists()
    assert len(list((tmp_path / "controls").iterdir())) == 2
    assert len(list((tmp_path / "controls").glob("*/validation/sample_textvqa_val/results.json"))) == 2


def test_a_control_may_stop_at_its_plateau(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plateau, "validation_scores", lambda *a, **k: {"x": 0.5})
    overrides = [
        f"teacher.model={folder / 'student'}", "stages.sft.terms={cross_entropy: 1.0, forward_kl: 1.0}", "stages.sft.steps=8",
        "controls={equal_steps: {stages: {sft: {until: {kind: plateau, every: 2, patience: 1}}}}}",
        "guards.teacher_is_better=false", "evaluation.limit=2",
    ]  # fmt: skip
    found = load_recipe(recipe, overrides)
    assert found.controls["equal_steps"].kind == "equal_steps"
    train_controls(found, lambda: build_student(found, {}, []), {}, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / control.FACTS).read_text())["control"]
    assert facts["steps"] == {"sft": "8 steps"} and facts["plateau"]["sft"]["steps"] == 4

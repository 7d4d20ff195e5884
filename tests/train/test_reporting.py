"""Trainings on dashboards: TensorBoard's own reader finds every term; what is missing is said; nothing is sent unasked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tower

from mmkd.errors import DataError, RecipeError
from mmkd.recipes.reading import load_recipe
from mmkd.runs.machine import machine_errors
from mmkd.runs.run import distill
from mmkd.sample.sample_set import write_sample_set
from mmkd.train import spec
from mmkd.train.reporting import refusals, report
from mmkd.train.spec import tracker_errors

VISION = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reporting")
    write_sample_set(folder / "sample", sizes={"train": 8, "test": 2})
    for seed, name in ((3, "student"), (4, "teacher")):
        tiny_tower(seed, vision=VISION, image_size=(64, 64)).save(folder / name)
    stage = {
        "data": [{"card": "sample_textvqa"}], "steps": 4, "log_every": 2, "save_every": 2,
        "terms": {"cross_entropy": 1.0, "kl": {"kind": "forward_kl", "weight": 0.5}},
        "optimiser": {"batch_size": 4, "learning_rate": 1e-2},
    }  # fmt: skip
    content = {
        "title": "t", "output": str(folder / "runs" / "run"), "data_root": str(folder / "sample"),
        "teacher": {"model": str(folder / "teacher")}, "student": {"model": str(folder / "student")},
        "stages": {"one": stage, "two": stage | {"terms": {"reverse_kl": 1.0}}}, "controls": ["equal_steps"],
        "evaluation": {"benchmarks": ["sample_textvqa"], "limit": 3, "every": 2},
        "guards": {"pixels_matter": False, "teacher_is_better": False},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads: by tag {step: value}."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_every_term_and_score_arrives_in_tensorboard(recipe):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    found = load_recipe(recipe, ["report_to=tensorboard"])
    distill(found)
    run = Path(found.output)
    for role, terms in (("student", {"one": {"cross_entropy", "kl"}, "two": {"reverse_kl"}}),
                        ("control", {"one": {"cross_entropy"}, "two": {"cross_entropy"}})):  # fmt: skip
        rows = [json.loads(line) for line in (run / "log" / f"{role}.jsonl").read_text().splitlines()]
        for stage, names in terms.items():
            told = scalars(run / "tensorboard" / role / stage)
            for name in (*names, "loss", "grad_norm", "learning_rate"):
                logged = {row["step"]: row[name] for row in rows if row["stage"] == stage and name in row}
                assert told[f"train/{name}"] == pytest.approx(logged, rel=1e-6) and list(logged) == [2, 4]
    scored = {row["step"]: row["score sample_textvqa"] for row in rows if row.get("stage") == "two" and "loss" not in row}
    assert scalars(run / "tensorboard" / "control" / "two")["eval/sample_textvqa"] == pytest.approx(scored)
    assert load_recipe(recipe).report_to == []
    assert distill(load_recipe(recipe))["title"] == "t"  # goes on without dashboards


def test_nothing_is_written_unless_asked(recipe, monkeypatch):
    class Refuses:
        def find_spec(self, name, *rest):
            assert name.partition(".")[0] not in ("tensorboard", "wandb", "trackio"), name

    found = load_recipe(recipe, [f"output={recipe.parent / 'quiet' / 'run'}", "controls=[]", "evaluation.every=null"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    distill(found)
    assert not (Path(found.output) / "tensorboard").exists()


def test_short_forms_and_unknown_names(recipe):
    assert load_recipe(recipe, ["report_to=[tensorboard, wandb]"]).report_to == ["tensorboard", "wandb"]
    assert load_recipe(recipe, ["report_to=none"]).report_to == []
    with pytest.raises(RecipeError, match="report_to.*'tensorboard', 'wandb' or 'trackio'"):
        load_recipe(recipe, ["report_to=mlflow"])


def test_what_is_not_installed_is_refused_before_anything_is_loaded(recipe, monkeypatch):
    monkeypatch.setattr(spec, "find_spec", lambda name: None)
    found = load_recipe(recipe, ["report_to=[wandb]"])
    (wrong,) = machine_errors(found)
    assert wrong == "report_to: wandb is not installed; pip install wandb, or take it out"
    assert len(list(tracker_errors(["trackio", "tensorboard"]))) == 2
    with pytest.raises(DataError, match="pip install wandb"):
        distill(found.model_copy(update={"output": str(recipe.parent / "none" / "run")}))


def test_what_a_dashboard_refuses_is_one_line():
    class UsageError(Exception):
        __module__ = "wandb.errors"

    with pytest.raises(DataError, match=r"^report_to: wandb says: no API key; log in \(`wandb login`\), set WANDB_MODE=offline"):  # noqa: SIM117
        with refusals(["wandb"]):
            raise UsageError("no\nAPI key.")
    with pytest.raises(UsageError), refusals(["tensorboard"]):  # not asked for, so it is no mistake of the user's
        raise UsageError("other")


class Callback:
    tb_writer = logging_dir = None


class Trainer:
    def __init__(self):
        self.args = type("Args", (), {"run_name": "one", "trackio_space_id": "trackio", "project": "huggingface"})()
        self.callback_handler = type("Handler", (), {"callbacks": [Callback()]})()
        self.added = []

    def add_callback(self, callback):
        self.added.append(callback)


def test_names_places_and_no_space_of_the_hub(monkeypatch):
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_PROJECT", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    trainer = Trainer()
    report(trainer, ["trackio", "tensorboard"], "run, student, one", Path("x"))
    assert vars(trainer.args) == {"run_name": "run, student, one", "trackio_space_id": None, "project": "mmkd"}
    assert trainer.callback_handler.callbacks[0].logging_dir == "x" and not trainer.added
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    report(trainer, ["wandb"], "run, student, two", Path("y"))
    assert trainer.callback_handler.callbacks[0].logging_dir == "x" and len(trainer.added) == 1

"""Grids of methods, data and seeds, run on tiny towers."""

import json
import statistics
from xml.etree import ElementTree

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from tiny import tiny_tower

from mmkd.cli import main
from mmkd.errors import RecipeError
from mmkd.recipes.reading import load_recipe
from mmkd.runs.ablation import ablate, ablation_table, load_grid
from mmkd.runs.run import distill
from mmkd.sample.sample_set import write_sample_set

METHODS = {
    "sft": {"stages": {"answer": {"terms": {"cross_entropy": 1.0}}}},
    "kd": {
        "stages": {
            "first": {"share": 0.25, "terms": {"cross_entropy": 1.0}},
            "second": {"share": 0.75, "terms": {"kl": {"kind": "forward_kl"}}},
        }
    },
}


@pytest.fixture
def grid_file(tmp_path):
    write_sample_set(tmp_path / "sample", sizes={"train": 8, "test": 4})
    tiny_tower(5, 24).save(tmp_path / "teacher")
    tiny_tower(6).save(tmp_path / "student")
    recipe = {
        "title": "test", "output": str(tmp_path / "alone"), "data_root": str(tmp_path / "sample"), "max_length": 512,
        "teacher": {"model": str(tmp_path / "teacher")}, "student": {"model": str(tmp_path / "student")},
        "stages": {
            "answer": {
                "data": [{"card": "sample_textvqa"}], "terms": {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}},
                "steps": 4, "optimiser": {"batch_size": 4, "learning_rate": 1e-2},
            }
        },
        "evaluation": {"benchmarks": ["sample_textvqa"], "limit": 4}, "guards": {"teacher_is_better": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    grid = {
        "kind": "ablation", "title": "grid", "output": str(tmp_path / "grid"), "seeds": [0, 1], "reference": "sft",
        "data": {"sample": {"recipe": "recipe.yaml"}}, "methods": METHODS,
    }  # fmt: skip
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def test_runs_share_out_the_steps_and_go_seed_by_seed(grid_file):
    _, runs = load_grid(grid_file, [])
    assert [(run.method, run.seed) for run in runs] == [("sft", 0), ("kd", 0), ("sft", 1), ("kd", 1)]
    assert [stage.steps for stage in runs[1].recipe.stages.values()] == [1, 3]
    assert [stage.optimiser.learning_rate for stage in runs[1].recipe.stages.values()] == [1e-2, 1e-2]
    assert [*runs[1].recipe.stages["second"].terms] == ["kl"]


def changed(grid_file, **methods):
    grid = yaml.safe_load(grid_file.read_text())
    grid["methods"] |= methods
    grid_file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return load_grid(grid_file, ["seeds=[0]"])


def test_a_method_may_have_steps_of_its_own(grid_file):
    answer = {"terms": {"cross_entropy": 1.0}}
    _, runs = changed(
        grid_file, longer={"steps": 10, "stages": METHODS["kd"]["stages"]}, own={"stages": {"answer": {**answer, "steps": 7}}},
        epochs={"stages": {"answer": {**answer, "epochs": 2.0}}},
        mixed={"stages": {"first": {**answer, "steps": 3}, "second": answer}},
    )  # fmt: skip
    lengths = {run.method: [(s.steps, s.epochs) for s in run.recipe.stages.values()] for run in runs}
    assert lengths["longer"] == [(2, None), (8, None)] and lengths["own"] == [(7, None)] and lengths["epochs"] == [(None, 2.0)]
    assert lengths["mixed"] == [(3, None), (4, None)]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"stages": {"answer": {"share": 1.0, "steps": 3}}}, "either `share` or a length of its own"),
        ({"steps": 5, "stages": {"answer": {"steps": 3}}}, "every stage has a length of its own"),
    ],
)
def test_lengths_that_contradict_are_refused(grid_file, method, said):
    with pytest.raises(RecipeError, match=said):
        changed(grid_file, kd=method)


def test_a_method_may_write_its_data(grid_file):
    words = {"kind": "write", "by": "teacher", "prompt": "as_asked", "data": [{"card": "sample_captions"}], "max_new_tokens": 4}
    stages = {"words": words, "learn": {"data": [{"card": "sample_textvqa"}, {"from": "words"}]}}
    _, runs = changed(grid_file, written={"stages": stages})
    recipe = runs[2].recipe
    assert [*recipe.writes] == ["words"] and [*recipe.stages] == ["learn"] and recipe.stages["learn"].steps == 4
    ablate(*load_grid(grid_file, ["seeds=[0]", "methods.sft=null", "methods.kd=null", "reference=written"]))
    summary = json.loads((runs[2].folder / "summary.json").read_text())
    assert summary["benchmarks"]["sample_textvqa"]["n"] == 4
    (rows,) = grid_file.parent.glob("grid/sample/written/written/words-*/train.jsonl")
    assert rows.exists()


def test_a_method_is_held_against_controls_of_its_own(grid_file):
    kd = {"controls": ["equal_steps"], "stages": {"answer": {"terms": {"kl": {"kind": "forward_kl"}}}}}
    grid, runs = changed(grid_file, kd=kd)
    assert [[*run.recipe.controls] for run in runs] == [[], ["equal_steps"]]
    result = ablate(grid, runs)
    assert not (runs[0].folder / "control").exists() and (runs[1].folder / "control").exists()
    methods = result["data"]["sample"]["methods"]
    entry = json.loads((runs[1].folder / "summary.json").read_text())["benchmarks"]["sample_textvqa"]
    assert methods["kd"]["mean"]["student_minus_best_control"]["values"] == [entry["student"] - entry["control"]]
    assert "student_minus_best_control" not in methods["sft"]["mean"]
    assert "over its best control" in ablation_table(result)


def test_all_errors_come_at_once(grid_file):
    grid = yaml.safe_load(grid_file.read_text())
    grid["methods"]["kd"]["stages"]["second"]["terms"] = {"kl": {"kind": "forward_lk"}}
    grid["methods"]["other"] = {"stages": {"answer": {"stepz": 3}}}
    grid_file.write_text(yaml.safe_dump(grid))
    with pytest.raises(RecipeError) as error:
        load_grid(grid_file, [])
    assert "kd on sample" in str(error.value) and "forward_kl" in str(error.value)
    assert "other on sample" in str(error.value) and "stepz" in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods.kd.stages.first.share=0.5", "do not add up to 1: first 0.5, second 0.75"),
        ("reference=stf", "'stf' is none of the methods sft, kd"),
        ("data={sample: null}", "nothing is left"),
        ("seeds=[]", "seeds"),
    ],
)
def test_a_wrong_grid_is_explained(grid_file, override, said, capsys):
    assert main(["distill", str(grid_file), override]) == 2
    assert said in capsys.readouterr().err


def test_a_grid_runs_whole_resumes_and_adds_up(grid_file, tmp_path, capsys):
    assert main(["distill", str(grid_file), "--seeds", "0,1"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert result["missing"] == []
    found = result["data"]["sample"]
    summaries = {
        (method, seed): json.loads((tmp_path / "grid/sample" / method / f"seed_{seed}" / "summary.json").read_text())
        for method in METHODS for seed in (0, 1)
    }  # fmt: skip
    scores = {key: summary["benchmarks"]["sample_textvqa"]["student"] for key, summary in summaries.items()}
    lead = found["methods"]["kd"]["mean"]["lead"]
    assert lead["values"] == [scores["kd", seed] - scores["sft", seed] for seed in (0, 1)]
    assert lead["mean"] == pytest.approx(statistics.mean(lead["values"]))
    assert found["methods"]["sft"]["mean"]["lead"]["values"] == [0.0, 0.0]
    assert 0 <= found["teacher"]["sample_textvqa"] <= 1
    assert "| kd |" in shown and "| teacher |" in shown
    entries = {key: summary["benchmarks"]["sample_textvqa"] for key, summary in summaries.items()}
    doubt = {key: entry["calibration"]["student"]["nll"]["value"] for key, entry in entries.items()}
    assert found["methods"]["kd"]["mean"]["nll_lead"]["values"] == [doubt["kd", seed] - doubt["sft", seed] for seed in (0, 1)]
    assert "| NLL | NLL over the reference |" in shown
    plot = ElementTree.parse(tmp_path / "grid" / "grid.svg")
    assert [e.text for e in plot.iter("{http://www.w3.org/2000/svg}text")].count("kd") == 1

    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "grid").rglob("model.safetensors")}
    assert len(times) > 0
    ablate(*load_grid(grid_file, []))
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "grid").rglob("model.safetensors")}


def test_the_sft_method_is_the_sft_control(grid_file, tmp_path):
    ablate(*load_grid(grid_file, ["seeds=[3]", "methods.kd=null"]))
    distill(load_recipe(tmp_path / "recipe.yaml", ["seed=3"]))
    of_grid = load_file(tmp_path / "grid/sample/sft/seed_3/student/model.safetensors")
    control = load_file(tmp_path / "alone/control/model.safetensors")
    assert of_grid.keys() == control.keys()
    assert all(torch.equal(of_grid[name], control[name]) for name in control)


def test_a_run_that_another_process_does_is_left_to_it(grid_file, tmp_path):
    grid, runs = load_grid(grid_file, ["seeds=[0]"])
    runs[0].folder.parent.mkdir(parents=True)
    with FileLock(runs[0].folder.with_suffix(".lock")):
        result = ablate(grid, runs)
    assert result["missing"] == ["sample, sft, seed 0"]
    assert result["data"]["sample"]["methods"]["kd"]["mean"]["lead"] is None
    assert ablate(grid, runs)["missing"] == []

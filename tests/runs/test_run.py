"""Whole runs through the command line, on tiny towers: the comparison, resuming after SIGKILL, two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_tower
from transformers import AutoModelForImageTextToText

from mmkd.base.checksums import check_whole
from mmkd.cli import main
from mmkd.sample.sample_set import write_sample_set

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
CLI = [sys.executable, "-m", "mmkd.cli"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A two-stage recipe with a random teacher, on a few scenes of the embedded sample."""
    folder = tmp_path_factory.mktemp("run")
    write_sample_set(folder / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(5, 32, vision=VISION, image_size=(64, 64)).save(folder / "teacher")
    student = {
        "assemble": {
            "vision": {"config": VISION, "feature_layer": -1},
            "language": {"config": {"model_type": "llama", **SIZES, "num_key_value_heads": 2}},
            "tokenizer": {"source": "teacher"},
        }
    }
    optimiser = {"batch_size": 4, "learning_rate": 1e-3}
    stages = {
        "first": {
            "data": [{"card": "sample_captions"}],
            "terms": {"cross_entropy": 1, "relation": 0.5, "features": {"kind": "feature_match"}},
            "steps": 6, "save_every": 2, "log_every": 2, "optimiser": optimiser,
        },
        "second": {
            "data": [{"card": "sample_scienceqa"}, {"card": "sample_textvqa"}],
            "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}, "vsd": {"kind": "dbild", "path": "switch"}},
            "steps": 6, "save_every": 2, "log_every": 2, "optimiser": optimiser | {"micro_batch_size": 2},
        },
    }
    content = {
        "title": "test", "output": "OUTPUT", "data_root": str(folder / "sample"), "max_length": 512,
        "teacher": {"model": str(folder / "teacher")}, "student": student, "stages": stages,
        "evaluation": {"benchmarks": ["sample_scienceqa", "sample_textvqa"], "limit": 6},
        "guards": {"teacher_is_better": False}, "controls": ["equal_steps"],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"model_type": "vit", **SIZES, "image_size": 64, "patch_size": 16}


def run(recipe: Path, output: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [*CLI, "distill", str(recipe), f"output={output}", *overrides]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done


def weights(output: Path, role: str = "student") -> dict:
    return load_file(output / role / "model.safetensors")


def test_a_run_ends_in_a_comparison(undisturbed):
    output, done = undisturbed
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["benchmarks"]) == {"sample_scienceqa", "sample_textvqa"}
    for entry in summary["benchmarks"].values():
        assert entry["n"] == 6
        assert all(0 <= entry[role] <= 1 for role in ("teacher", "control", "student"))
        low, high = entry["student_minus_control"]["ci95"]
        assert low <= entry["student_minus_control"]["mean"] <= high
    assert summary["seconds"] > 0
    page = (output / "report.html").read_text()
    assert "student" in page and "http://" not in page and "https://" not in page
    assert entry["controls"]["equal_steps"]["score"] == entry["control"]
    assert entry["student_minus_best_control"] == entry["student_minus_control"] | {"name": "equal_steps"}
    assert "control" in done.stdout and entry["verdict"] in done.stdout and "report.html" in done.stdout
    rows = [json.loads(line) for line in (output / "log" / "student.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(s, n) for s in ("first", "second") for n in (2, 4, 6)]
    assert {"cross_entropy", "relation", "features"} <= rows[0].keys() and {"kl", "vsd"} <= rows[-1].keys()


def test_the_student_has_a_model_card_that_report_writes_again(recipe, undisturbed):
    output, _ = undisturbed
    path, summary = output / "student" / "README.md", json.loads((output / "summary.json").read_text())
    card = path.read_text(encoding="utf-8")
    for entry in summary["benchmarks"].values():
        assert f"| student | {100 * entry['student']:.1f} % |" in card
    assert f"| ended | {summary['ended']} |" in card and str(recipe.parent) not in card and "base_model" not in card
    counts = summary["samples"]
    assert {stage: len(found) for stage, found in counts.items()} == {"first": 1, "second": 2} and "hub" not in summary
    for name, count in zip(("captions", "scienceqa", "textvqa"), counts["first"] + counts["second"], strict=True):
        assert count > 0 and f"| sample\\_{name} | {count} | split train, labels |" in card
    path.unlink()
    assert main(["report", str(output)]) == 0 and path.read_text(encoding="utf-8") == card
    AutoModelForImageTextToText.from_pretrained(path.parent)
    check_whole(path.parent, "")


def test_the_first_line_says_that_a_random_teacher_gave_no_lead(undisturbed):
    output, done = undisturbed
    (first,) = re.findall(r"<h1[^>]*>(.*?)</h1>", (output / "report.html").read_text(), re.DOTALL)
    assert "no difference on any of 2 benchmarks" in first or "on none of 2 benchmarks" in first
    assert "leads its control" not in done.stdout


def test_control_is_the_same_student_without_the_teacher(undisturbed):
    output, _ = undisturbed
    control, student = weights(output, "control"), weights(output)
    assert control.keys() == student.keys()
    assert any(not torch.equal(control[name], student[name]) for name in control)
    rows = [json.loads(line) for line in (output / "log" / "control.jsonl").read_text().splitlines()]
    assert all("kl" not in r and "features" not in r and "cross_entropy" in r for r in rows)
    assert not list(output.glob("stages/*/*/checkpoint-*")), "checkpoints of finished stages are removed"


def test_running_again_reuses_everything(recipe, undisturbed):
    output, _ = undisturbed
    before = (output / "student" / "model.safetensors").stat().st_mtime_ns
    again = run(recipe, output)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (output / "student" / "model.safetensors").stat().st_mtime_ns == before
    assert "stage first" not in again.stderr


def test_another_recipe_in_the_same_folder_is_refused(recipe, undisturbed):
    output, _ = undisturbed
    other = run(recipe, output, "stages.second.terms.kl.weight=2")
    assert other.returncode == 2
    assert "stages.second.terms.kl.weight" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    "place",
    [
        "../controls/*/stages/control/1_second/checkpoint-2/complete",
        "stages/student/0_first/checkpoint-4/complete",
        "stages/student/1_second/checkpoint-2/optimizer.pt",
    ],
)
def test_killed_and_started_again_ends_with_the_same_weights(recipe, undisturbed, tmp_path, place):
    output = tmp_path / "out"
    command = [*CLI, "distill", str(recipe), f"output={output}"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        base, pattern = (tmp_path, place.removeprefix("../")) if place.startswith("../") else (output, place)
        while not list(base.glob(pattern)):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline, "the place was never reached"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (output / "summary.json").exists()
    done = run(recipe, output)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(undisturbed[0]), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (output / "log" / "student.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 2, 4, 6]


def test_two_processes_are_one(recipe, undisturbed, tmp_path):
    output = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmkd.cli"]
    command = [*launch, "distill", str(recipe), f"output={output}", "stages.second.optimiser.micro_batch_size=1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(undisturbed[0]), weights(output)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=2e-5, msg=name)
    logs = [[json.loads(x) for x in (o / "log" / "student.jsonl").read_text().splitlines()] for o in (undisturbed[0], output)]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "cross_entropy"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (one["stage"], one["step"], key)


def test_micro_batches_give_the_same_weights(recipe, undisturbed, tmp_path):
    smaller = [f"stages.{stage}.optimiser.micro_batch_size={size}" for stage, size in (("second", 4), ("first", 1))]
    done = run(recipe, tmp_path / "out", *smaller, "controls=[]")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(undisturbed[0]), weights(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def test_a_teacher_ahead_gives_the_same_weights(recipe, tmp_path):
    common = ("controls=[]", "evaluation.benchmarks=[]", "stages.second.terms.vsd.path=student")
    for name, ahead in (("plain", "false"), ("ahead", "true")):
        done = run(recipe, tmp_path / name, *common, f"teacher.ahead={ahead}")
        assert done.returncode == 0, done.stderr[-3000:]
    plain, ahead = weights(tmp_path / "plain"), weights(tmp_path / "ahead")
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)

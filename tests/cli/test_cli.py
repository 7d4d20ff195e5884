"""The command line: quick help, and a clear message with exit code 2 for each mistake of a user."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_tower

from mmkd.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
RECIPE = """
title: t
output: {output}
student: {{model: {model}}}
stages: {{sft: {{data: [{{{data}}}], terms: {{cross_entropy: 1.0}}, steps: 1}}}}
evaluation: {{benchmarks: [{benchmark}]}}
"""


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def cpu_seconds(*arguments: str) -> float:
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_works_both_ways():
    module, command = python("-m", "mmkd.cli", "--help"), python("-c", "from mmkd.cli import main; main(['--help'])")
    assert module.returncode == command.returncode == 0
    for output in (module.stdout, command.stdout):
        assert output.startswith("usage: mmkd")
        assert all(name in output for name in ("distill", "evaluate", "report", "check", "list", "sample"))


def test_help_takes_at_most_0_3_seconds():
    assert min(cpu_seconds("-m", "mmkd.cli", "--help") for _ in range(3)) <= 0.3


def test_no_help_imports_anything_heavy():
    """Of mmkd and of every command, in one process: what one of them imports would be seen."""
    script = f"""
import contextlib, io, sys
from mmkd.cli import main
for words in [[], *([name] for name in {list(COMMANDS)})]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert out.getvalue().startswith(" ".join(["usage: mmkd", *words])), out.getvalue()
print(sorted({{m.split(".")[0] for m in sys.modules}} & {{"torch", "transformers", "numpy", "PIL", "pydantic", "yaml"}}))
"""
    run = python("-c", script)
    assert run.stdout.splitlines() == ["[]"], run.stderr


@pytest.fixture
def recipe(tmp_path):
    def write(**changes: str) -> str:
        fields = {"output": tmp_path / "run", "model": tmp_path / "model", "benchmark": "", "data": "format: jsonl, root: data"}
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(**(fields | changes)), encoding="utf-8")
        return str(path)

    return write


def refused(capsys, *arguments: str) -> str:
    """The message of a command that ends with 2."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    return error


def test_an_unknown_key(capsys, recipe):
    message = refused(capsys, "distill", recipe(), "sed=1", "stages.sft.step=2")
    assert message.startswith("mmkd: ") and "has 2 errors" in message
    assert "sed: unknown key; did you mean 'seed'?" in message
    assert "stages.sft.step: unknown key; did you mean 'steps'?" in message


def test_a_recipe_that_is_not_there(capsys):
    assert refused(capsys, "distill", "nowhere.yaml") == "mmkd: there is no recipe nowhere.yaml\n"


def test_an_unknown_card_gets_a_suggestion(capsys, recipe):
    message = refused(capsys, "distill", recipe(data="card: sample_sciencqa"), "--dry-run")
    assert "there is no card 'sample_sciencqa'" in message and "did you mean 'sample_scienceqa'" in message


def test_a_data_folder_that_is_not_there(capsys, recipe, tmp_path):
    root = tmp_path / "no_data"
    message = refused(capsys, "distill", recipe(data=f"format: jsonl, root: {root}"), "--dry-run")
    assert str(root) in message and len(message.splitlines()) == 1


def test_an_unknown_benchmark(capsys, recipe, tmp_path):
    message = refused(capsys, "distill", recipe(benchmark="scienceq"), "--dry-run")
    assert "'scienceq'" in message and "'scienceqa'" in message
    message = refused(capsys, "evaluate", str(tmp_path), "--benchmarks", "textvq")
    assert "'textvq'" in message and "'textvqa'" in message


def test_a_model_folder_that_is_not_there(capsys, tmp_path):
    folder = tmp_path / "no_model"
    assert f"no image-text model can be loaded from '{folder}'" in refused(capsys, "check", str(folder))


def test_a_run_that_is_not_there(capsys, tmp_path):
    assert str(tmp_path / "run") in refused(capsys, "report", str(tmp_path / "run"))


@pytest.mark.parametrize("arguments", [[], ["distil", "x"], ["list", "model"], ["evaluate", "x"]])
def test_wrong_usage(capsys, arguments):
    assert "usage: mmkd" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "order",
    [
        ["RECIPE", "sed=1", "stages.sft.step=2", "--dry-run"],
        ["RECIPE", "--dry-run", "sed=1", "stages.sft.step=2"],
        ["--dry-run", "RECIPE", "sed=1", "stages.sft.step=2"],
        ["RECIPE", "sed=1", "--dry-run", "stages.sft.step=2"],
        ["--seeds", "0,1", "RECIPE", "sed=1", "--dry-run", "stages.sft.step=2"],
        ["RECIPE", "sed=1", "--seeds", "0,1", "stages.sft.step=2", "--dry-run"],
    ],
)
def test_options_and_overrides_in_any_order(capsys, recipe, order):
    message = refused(capsys, "distill", *[recipe() if part == "RECIPE" else part for part in order])
    assert "sed: unknown key" in message and "stages.sft.step: unknown key" in message and "has 2 errors" in message


@pytest.mark.parametrize(
    "command", [["cache", "--forecast"], ["cache", "--top-k", "3"], ["estimate", "--memory", "4"], ["rank", "--seeds", "0,1"]]
)
def test_overrides_after_options_of_other_commands(capsys, recipe, command):
    name, *options = command
    assert "override 'seed' is not key=value" in refused(capsys, name, recipe(), "title=x", *options, "seed")


def test_the_last_of_two_overrides_wins_across_options(capsys, recipe):
    assert "seed: Input should be a valid integer" in refused(capsys, "distill", recipe(), "seed=1", "--dry-run", "seed=a")
    assert "(given: 'b')" in refused(capsys, "distill", recipe(), "seed=a", "--dry-run", "seed=b")


@pytest.mark.parametrize("arguments", [["--dryrun"], ["seed=1", "--dryrun"], ["--dry-run", "--sed", "1"], ["-x"]])
def test_an_option_that_does_not_exist(capsys, recipe, arguments):
    message = refused(capsys, "distill", recipe(), *arguments)
    assert "there is no option --dryrun" in message or "there is no option --sed" in message or "there is no option -x" in message
    assert "usage: mmkd distill" in message


@pytest.mark.parametrize("override", ["seed 1", "seed", "seed==1", "=1", "stages..steps=1", "seed =1", "stages.=1"])
def test_what_is_no_override(capsys, recipe, override):
    for arguments in ([override, "--dry-run"], ["--dry-run", override]):
        assert f"override {override!r} is not key=value" in refused(capsys, "distill", recipe(), *arguments)


def test_more_than_a_command_takes(capsys):
    assert "b: more than this command takes" in refused(capsys, "report", "a", "b")


def test_an_output_that_cannot_be_a_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(capsys, "sample", str(tmp_path / "file" / "sample"), "--sizes", "train=1,val=1,test=1")
    assert str(tmp_path / "file") in message and "take an output folder that can be made" in message


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "No space left on device: x; make room"), (errno.EROFS, "Read-only file system: x; take an output folder")],
)
def test_a_disk_that_refuses(capsys, monkeypatch, number, message):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr("mmkd.sample.sample_set.write_sample_set", fail)
    assert message in refused(capsys, "sample", "x")


def test_a_disk_that_is_full_while_a_folder_is_copied(capsys, monkeypatch):
    def fail(*_, **__):
        raise shutil.Error([("a", "b/model.safetensors", f"[Errno {errno.ENOSPC}] No space left on device: 'a' -> 'b'")])

    monkeypatch.setattr("mmkd.sample.sample_set.write_sample_set", fail)
    message = refused(capsys, "sample", "x")
    assert "No space left on device: b/model.safetensors; make room" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("option", ["--batch-size", "--top-k"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_counts_that_are_none(capsys, recipe, option, value):
    assert f"{value!r} is no whole number of at least 1" in refused(capsys, "cache", recipe(), option, value)


def test_stopped_by_the_keyboard(capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmkd.sample.sample_set.write_sample_set", stop)
    assert main(["sample", "x"]) == 130 and "the same command goes on" in capsys.readouterr().err


def test_wrong_sizes_of_the_sample(capsys, tmp_path):
    assert "is not of the form train=3000" in refused(capsys, "sample", str(tmp_path), "--sizes", "train:3")


def test_a_mistake_leaves_no_traceback_in_a_process_of_its_own():
    run = python("-m", "mmkd.cli", "distill", "nowhere.yaml")
    assert (run.returncode, run.stderr) == (2, "mmkd: there is no recipe nowhere.yaml\n")


def test_check_prints_what_it_measured(capsys, tmp_path):
    tiny_tower().save(tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    assert '"visual switch": "yes"' in capsys.readouterr().out


def test_list_prints_the_cards(capsys):
    assert main(["list", "evaluation"]) == 0
    assert "scienceqa" in capsys.readouterr().out


def test_pairs_of_test_answers_are_refused_in_one_line(tmp_path, capsys):
    for name in ("right", "wrong"):
        (tmp_path / name / "tiny").mkdir(parents=True)
        (tmp_path / name / "tiny" / "predictions.jsonl").write_text("")
        (tmp_path / name / "tiny" / "results.json").write_text('{"split": "test"}')
    folders = [str(tmp_path / name) for name in ("right", "wrong")]
    message = refused(capsys, "pairs", *folders, "--data-root", str(tmp_path), "--output", str(tmp_path / "pairs.jsonl"))
    assert "run `mmkd evaluate --split train`" in message

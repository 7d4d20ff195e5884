"""docs/extend.md: every block of the page, from the command line, in its order; and what a user's own term is told and shown."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import tiny_picture, tiny_tokenizer, tiny_tower

from mmkd.cli import main
from mmkd.registry import registry

PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]
NAMES = {
    "terms": ("total_variation", "mean_feature", "by_picture"), "formats": ("semicolons",), "metrics": ("no_spaces",),
    "samplers": ("short_first",), "encoders": ("patches",),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder of a user: two models, data, and the files of the page."""
    folder = tmp_path_factory.mktemp("extend")
    tokenizer = tiny_tokenizer()
    tiny_tower(1, 16, tokenizer=tokenizer).save(folder / "my-student")
    tiny_tower(2, 32, tokenizer=tokenizer).save(folder / "my-teacher")
    rows, lines = [], []
    for number in range(8):
        tiny_picture(folder / "data", f"{number}.png", number)
        tiny_picture(folder / "lines" / "pictures", f"{number}.png", 20 + number)
        answer = ("red", "left of", "green")[number % 3]
        rows.append(json.dumps({"id": str(number), "image": f"{number}.png", "question": "what?", "answer": answer}))
        lines.append(f"{number}.png;what?;{answer}")
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "lines" / "train.txt").write_text("\n".join(lines) + "\n")
    for language, text in BLOCKS:
        if language:
            name = text.partition("\n")[0].removeprefix("# ")
            (folder / name).write_text(text, encoding="utf-8")
    yield folder
    for kind, names in NAMES.items():
        for name in names:
            registry(kind).remove(name)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_the_page_has_an_example_of_each_kind():
    files = [text.partition("\n")[0].removeprefix("# ") for language, text in BLOCKS if language == "python"]
    assert [name.partition("my_")[2] for name in files] == [
        "row_term.py", "feature_term.py", "mixture.py", "format.py", "metric.py", "sampler.py", "encoder.py"
    ]  # fmt: skip
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command, capsys):
    program, *arguments = shlex.split(command)
    assert program == "mmkd"
    assert main(arguments) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    if arguments[0] == "list":
        assert "total_variation" in out and "my_row_term:TotalVariation" in out and "temperature" in out
    if "--dry-run" in arguments:
        assert "total_variation (total_variation on response)" in out


def test_what_the_commands_left():
    """Runs after the commands of the page, in the same folder."""
    logged = [json.loads(line) for line in Path("runs/features/log/student.jsonl").read_text().splitlines()]
    assert logged[-1]["mean_feature"] > 0
    brought = json.loads(Path("runs/several/summary.json").read_text())["brought"]["answer"]["mix"]
    assert brought["seeing"]["weight"] == pytest.approx(0.9) and brought["seeing"]["used"] == 1
    assert brought["reading"] == {"weight": pytest.approx(0.1), "used": 0, "agreement": None, "lead": None}
    assert json.loads(next(Path("runs/scored").rglob("results.json")).read_text())["empty_answers"] >= 0
    assert Path("runs/assembled/student/config.json").exists()


def test_a_cache_that_cannot_serve_a_term_says_its_own_reason(capsys):
    assert main(["cache", "recipe.yaml", "teacher.cache=cached", "--workers", "0"]) == 0
    told = ["imports=[my_feature_term]", "stages.answer.terms.mean_feature=1", "teacher.cache=cached", "output=runs/refused"]
    assert main(["distill", "recipe.yaml", *told]) == 2
    reason = "stages.answer.terms.mean_feature: mean_feature looks at pictures, which this cache does not hold"
    assert reason in capsys.readouterr().err
    assert not Path("runs/refused/student").exists()


def test_an_own_term_is_in_the_estimate(capsys):
    given = ["imports=[my_feature_term]", "stages.answer.terms.mean_feature=1"]
    assert main(["estimate", "recipe.yaml", *given]) == 0
    assert "mean_feature (mean_feature)" in capsys.readouterr().out


def test_a_module_that_is_not_there_is_named(capsys):
    assert main(["distill", "recipe.yaml", "imports=[my_nothing]"]) == 2
    assert "my_nothing" in capsys.readouterr().err


LORA = ["stages.answer.train=[language]", "stages.answer.lora={rank: 4}"]


def test_a_dry_run_counts_the_adapters_that_a_run_trains(capsys, caplog):
    assert main(["distill", "recipe.yaml", *LORA, "--dry-run"]) == 0
    counted = re.search(r"trains language \(([\d,]+) parameters\)", capsys.readouterr().out)[1]
    with caplog.at_level("INFO", logger="mmkd"):
        assert main(["distill", "recipe.yaml", *LORA, "output=runs/lora", "control=false"]) == 0
    trained = [r.getMessage() for r in caplog.records if r.getMessage().startswith("trained parameters: ")]
    assert counted != "0" and f"language {counted} of" in trained[0]


def test_an_estimate_takes_two_stages_with_adapters(capsys):
    (Path("twice.yaml")).write_text(Path("recipe.yaml").read_text() + (
        "  again:\n    data: [{format: jsonl, root: data}]\n    terms: {cross_entropy: 1.0}\n"
        "    optimiser: {batch_size: 4}\n    steps: 2\n    lora: {rank: 4}\n"
    ))
    assert main(["estimate", "twice.yaml", *LORA]) == 0
    out = capsys.readouterr().out
    assert "stage answer" in out and "stage again" in out

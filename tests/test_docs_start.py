"""The way of a new user is walked as it stands on its page, with the sample's small models in place of large ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mmkd.cli import main
from mmkd.sample.sample_set import write_sample_set

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
LARGE = {"Qwen/Qwen2.5-VL-7B-Instruct": "sample-teacher", "Qwen/Qwen2.5-VL-3B-Instruct": "sample-student"}


def commands() -> list[list[str]]:
    """All commands of the page in their order, as words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(pip|mmkd|vllm) ", line)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `my_data` as the page has it, of the sample's pictures, which its teacher knows how to read."""
    monkeypatch.chdir(tmp_path)
    write_sample_set(tmp_path / "sample", sizes={"train": 12, "test": 4})
    names = set(re.findall(r"valve-\d+\.jpg", PAGE))
    for split, file in (("train", "train"), ("test", "test")):
        content = json.loads(next((tmp_path / "sample" / "textvqa").glob(f"*_{split}.json")).read_text(encoding="utf-8"))
        pictures = {path.stem: path for path in (tmp_path / "sample" / "textvqa").rglob("*.*") if path.suffix in (".jpg", ".png")}
        rows = [
            {"image": f"{split}-{row['image_id']}.jpg", "question": row["question"], "answer": row["answers"][0]}
            for row in content["data"]
        ]  # fmt: skip
        (tmp_path / "my_data").mkdir(exist_ok=True)
        for row, source in zip(rows, content["data"], strict=True):
            (tmp_path / "my_data" / row["image"]).write_bytes(pictures[source["image_id"]].read_bytes())
        (tmp_path / "my_data" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in names:
        (tmp_path / "my_data" / name).write_bytes((tmp_path / "my_data" / rows[0]["image"]).read_bytes())
    return tmp_path


def test_the_way_is_short():
    assert len([words for words in commands() if words[0] != "pip"]) <= 8
    assert len(commands()) >= 8
    example = re.search(r"^```json\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]
    assert [sorted(json.loads(line)) for line in example.splitlines()] == [["answer", "image", "question"]] * 2


def test_the_page_is_walked_from_top_to_bottom(place, capsys):
    seen = []
    for program, *words in commands():
        words = [str(ROOT / "models" / LARGE[word]) if word in LARGE else word for word in words]
        if program == "vllm":
            assert words[0] == "serve" and (place / words[1] / "model.safetensors").is_file()
        if program != "mmkd" or (words[0] == "push" and "--dry-run" not in words):  # tests/runs/test_push.py sends one
            continue
        assert main(words) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        seen.append(words[0])
        if words[0] == "init":
            assert all((place / file).is_file() for file in ("recipe.yaml", "recipe_test.yaml"))
        if words[0] == "distill":
            assert Path("runs").exists() == ("--dry-run" not in words)
        if words[0] == "ask":
            assert [line.split()[0] for line in out.splitlines()] == ["teacher", "control", "control_equal_compute", "student"]
        if words[0] == "report":
            assert out.split() == ["runs/recipe/report.html", "runs/recipe/student/README.md"]
        if words[0] == "push":
            assert "YOUR_NAME/valve-reader (private): 8 files" in out and "refused" not in out
    assert seen == ["init", "distill", "distill", "ask", "report", "push"]

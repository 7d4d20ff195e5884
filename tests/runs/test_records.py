"""What a run's summary records beside its scores."""

import io
import json
import tarfile

import pytest
from PIL import Image

from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import samples_by_entry
from mmkd.runs.records import hub_ids, records


def picture() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "png")
    return content.getvalue()


@pytest.fixture
def recipe(tmp_path):
    """A stage of three rows and of a stream."""
    rows = [{"image": "a.png", "question": f"{n}?", "answer": "yes"} for n in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.png").write_bytes(picture())
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in {"0.json": json.dumps(rows[0]).encode(), "0.png": picture()}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    data = [{"format": form, "root": str(tmp_path), "prompt": "plain"} for form in ("jsonl", "shards")]
    return Recipe(
        title="t", output=str(tmp_path / "out"), teacher={"model": "big/teacher"}, student={"model": str(tmp_path)},
        stages={"sft": {"data": data, "terms": {"cross_entropy": 1}, "steps": 1}},
    )  # fmt: skip


def test_samples_are_counted_but_of_streams(recipe):
    assert samples_by_entry(recipe) == {"sft": [3, None]}


def test_folders_of_this_machine_are_no_hub_ids(recipe, tmp_path, monkeypatch):
    assert hub_ids(recipe) == {"teacher": ["big/teacher"]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big" / "teacher").mkdir(parents=True)
    assert hub_ids(recipe) == {}
    parts = {"vision": {"source": "hf-hub:org/eyes"}, "language": {"source": "org/words"}}
    assembled = recipe.model_copy(update={"student": type(recipe.student).model_validate({"assemble": parts})})
    assert hub_ids(assembled) == {"student": ["org/eyes", "org/words"]}
    parts["vision"]["source"] = "local-dir:" + str(tmp_path)
    assembled = recipe.model_copy(update={"student": type(recipe.student).model_validate({"assemble": parts})})
    assert hub_ids(assembled) == {"student": ["org/words"]}


def test_the_day_of_the_end_stays_while_the_scores_do(recipe):
    before = {"benchmarks": {"b": {"student": 0.5}}, "ended": "2020-01-02"}
    assert records(recipe, before["benchmarks"], before)["ended"] == "2020-01-02"
    assert records(recipe, {"b": {"student": 0.25}}, before)["ended"] > "2020-01-02"

"""Fingerprints of data: they follow the content of what is read, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from layouts import CARDS
from tiny import tiny_picture

from mmkd.data import content
from mmkd.data import fingerprint as module
from mmkd.data.entries import read_samples
from mmkd.data.fingerprint import fingerprint, samples_fingerprint
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.evaluation.benchmarks import load_benchmark

PICTURES = {".jpg", ".png"}


def easy_vqa(root: Path, answer: str = "teal") -> DataSpec:
    (root / "train" / "images").mkdir(parents=True, exist_ok=True)
    rows = [["what color is the shape?", answer, 0], ["is there a circle?", "no", 1]]
    (root / "train" / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    for number in range(2):
        tiny_picture(root / "train" / "images", f"{number}.png", number)
    return DataSpec(format="easy_vqa", root=str(root), prompt="short")


def state(spec: DataSpec, data_root: str | None = None) -> tuple:
    return fingerprint(spec, data_root), samples_fingerprint(read_samples(spec, 0, data_root))


def test_questions_below_folders_count(tmp_path):
    before = state(easy_vqa(tmp_path))
    assert state(easy_vqa(tmp_path)) == before
    changed = state(easy_vqa(tmp_path, answer="red"))
    assert changed[0]["files"].keys() == before[0]["files"].keys() == {"train/questions.json"}
    assert changed[0] != before[0] and changed[1] != before[1]


def test_what_is_not_read_does_not_count(tmp_path):
    spec = easy_vqa(tmp_path)
    before = state(spec)
    for name in ("other.json", "notes.jsonl", "train/more.json", "test/questions.json", "train/images/9.png", "x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]", encoding="utf-8")
    assert state(spec) == before


def test_a_copy_with_new_times_is_the_same_data(tmp_path):
    before = state(easy_vqa(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "two").rglob("*"):
        os.utime(path, (1, 1))
    assert state(DataSpec(format="easy_vqa", root=str(tmp_path / "two"), prompt="short")) == before
    assert state(DataSpec(format="easy_vqa", root="two", prompt="short"), str(tmp_path)) == before


def test_pictures_count_by_their_content(tmp_path):
    spec = easy_vqa(tmp_path)
    before = state(spec)
    tiny_picture(tmp_path / "train" / "images", "1.png", 7)
    after = state(spec)
    assert after[0] == before[0] and after[1] != before[1]
    (tmp_path / "train" / "images" / "1.png").unlink()
    assert state(spec)[1] not in (before[1], after[1])


def test_pictures_in_an_archive_count_by_their_content(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "question": "?", "answer": "a"}\n', encoding="utf-8")
    spec = DataSpec(format="jsonl", root=str(tmp_path), prompt="plain")

    def packed(seed: int, date: int, more: bool = False) -> str:
        data = tiny_picture(tmp_path, "a.png", seed).read_bytes()
        with zipfile.ZipFile(tmp_path / "train_images.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("a.png", (date, 1, 1, 0, 0, 0)), data)
            if more:
                archive.writestr("b.png", b"never read")
        return state(spec)[1]

    first = packed(0, 1990)
    assert packed(0, 2001, more=True) == first != packed(1, 1990)


def test_settings_of_the_entry_count(tmp_path):
    spec = easy_vqa(tmp_path)
    before = fingerprint(spec)
    assert fingerprint(spec.model_copy(update={"prompt": "plain"})) != before
    assert fingerprint(spec.model_copy(update={"limit": 1})) != before


def test_large_data_go_by_size_and_time(tmp_path, monkeypatch):
    spec = easy_vqa(tmp_path)
    monkeypatch.setattr(module, "BY_CONTENT", 10)
    before = state(spec)
    path = tmp_path / "train" / "images" / "0.png"
    os.utime(path, (1, 1))
    touched = state(spec)
    assert touched[0] == before[0] and touched[1] != before[1]
    assert touched[0]["files"]["train/questions.json"][0] == "questions.json"


def test_a_file_is_hashed_once_as_long_as_it_stays_the_same(tmp_path, monkeypatch):
    spec = easy_vqa(tmp_path)
    before = state(spec)
    monkeypatch.setattr(content, "_BLOCK", None)  # reading would fail
    assert state(spec) == before


@pytest.mark.parametrize("card", CARDS)
def test_every_file_of_a_benchmarks_layout_counts(tmp_path, card):
    CARDS[card][0](tmp_path)
    benchmark = load_benchmark(card)
    spec = DataSpec(format=benchmark.format, root=str(tmp_path), split=benchmark.split, files=benchmark.files)
    before = fingerprint(spec)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in PICTURES)
    assert sorted(before["files"]) == [path.relative_to(tmp_path).as_posix() for path in files]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        changed = fingerprint(spec)
        name = path.relative_to(tmp_path).as_posix()
        assert {key for key in before["files"] if changed["files"][key] != before["files"][key]} == {name}
        path.write_bytes(content)


def test_shards_and_folders_of_datasets_count(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.tar").write_bytes(bytes(1024))  # a tar without members
    assert list(fingerprint(DataSpec(format="shards", root=str(tmp_path)))["files"]) == ["one.tar"]
    with pytest.raises(DataError, match="has no tar shards"):
        fingerprint(DataSpec(format="shards", root=str(tmp_path), files={"shards": "*.tgz"}))

    from datasets import Dataset

    (tmp_path / "data").mkdir()
    spec = DataSpec(format="datasets", root=str(tmp_path / "data"))
    states = []
    for answer in ("a", "b"):
        Dataset.from_list([{"question": "?", "answer": answer}]).to_parquet(tmp_path / "data" / "train.parquet")
        Dataset.from_list([{"question": "?", "answer": answer}]).to_parquet(tmp_path / "data" / "test.parquet")
        states.append(fingerprint(spec))
    assert list(states[0]["files"]) == ["train.parquet"] and states[0] != states[1]


def test_a_data_set_of_the_hub_goes_by_its_name():
    found = fingerprint(DataSpec(format="datasets", root="someone/something"))
    assert found["files"] == {} and found["fields"]["root"] == "someone/something"

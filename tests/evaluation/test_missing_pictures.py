"""Pictures in the wrong folder: `evaluate` says so before it loads a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from layouts import CARDS, picture

from mmkd.data.formats import format_of
from mmkd.errors import DataError
from mmkd.evaluation import benchmarks
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.runs.evaluate import evaluate


def science(root: Path, folder: str, count: int = 20, missing: int = 0) -> Path:
    """ScienceQA's files, of which half the problems have a picture, in `folder`."""
    base = {"question": "Which?", "choices": ["air", "fire"], "answer": 0, "split": "test"}
    problems = {str(n): base | {"image": "image.png" if n < count else None} for n in range(2 * count)}
    root.mkdir(exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (root / "pid_splits.json").write_text(json.dumps({"test": list(problems)}), encoding="utf-8")
    for number in range(missing, count):
        picture(root / folder / "test" / str(number) / "image.png", number)
    return root


def refused(tmp_path: Path, benchmarks: list[str], **options) -> str:
    with pytest.raises(DataError) as error:
        evaluate(tmp_path / "no_model", benchmarks, data_root=tmp_path, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_the_first_missing_picture_and_the_layout_are_named(tmp_path: Path) -> None:
    root = science(tmp_path / "scienceqa", "pictures")
    message = refused(tmp_path, ["scienceqa"])
    assert f"20 of 20 pictures are not there, the first is {root}/test/0/image.png" in message
    assert "at most 1 % may be missing" in message and "--missing-pictures" in message
    assert f"Format 'scienceqa' looks in {root} for annotations: problems.json; splits: pid_splits.json; images: " in message
    assert "images/test/{pid}/{image} or test/{pid}/{image}" in message


def test_above_the_limit_and_below(tmp_path: Path, fake_tower) -> None:
    science(tmp_path / "scienceqa", "images", missing=3)
    assert "3 of 20 pictures" in refused(tmp_path, ["scienceqa"])
    assert "3 of 20 pictures" in refused(tmp_path, ["scienceqa"], missing_pictures=0.14)
    options = {"data_root": tmp_path, "output": tmp_path / "out"}
    found = evaluate(fake_tower(), "scienceqa", missing_pictures=0.15, **options)["scienceqa"]
    assert (found["n"], found["n_skipped"], found["skipped"]) == (37, 3, {"image cannot be read": 3})
    blind = evaluate(fake_tower(), "scienceqa", blind=True, data_root=tmp_path, output=tmp_path / "blind")["scienceqa"]
    assert (blind["n"], blind["n_skipped"]) == (40, 0)
    assert "missing_pictures is 15" in refused_share(tmp_path)


def refused_share(tmp_path: Path) -> str:
    with pytest.raises(DataError) as error:
        evaluate(tmp_path / "no_model", "scienceqa", data_root=tmp_path, missing_pictures=15)
    return str(error.value)


def test_one_in_a_hundred_may_be_missing(tmp_path: Path, fake_tower) -> None:
    science(tmp_path / "scienceqa", "images", count=100, missing=1)
    assert evaluate(fake_tower(), "scienceqa", data_root=tmp_path, output=tmp_path / "out")["scienceqa"]["n_skipped"] == 1
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "scienceqa" / "images" / "test" / "9")
    assert "2 of 100 pictures" in refused(tmp_path, ["scienceqa"])


def test_all_benchmarks_are_named_at_once(tmp_path: Path) -> None:
    for card in ("gqa", "chartqa", "pope"):
        root = tmp_path / load_benchmark(card).root
        root.mkdir()
        CARDS[card][0](root)
    (tmp_path / "gqa" / "images").rename(tmp_path / "gqa" / "allImages")
    shutil.rmtree(tmp_path / "pope" / "val2014")
    message = refused(tmp_path, ["gqa", "chartqa", "pope"])
    assert len(message.splitlines()) == 2 and "chartqa" not in message
    assert "gqa/images/n7.jpg" in message and "val2014/COCO_val2014_000000000042.jpg" in message


@pytest.mark.parametrize("card", CARDS)
def test_every_format_tells_its_layout(card: str) -> None:
    benchmark = load_benchmark(card)
    told = benchmark.layout()
    found = format_of(benchmark.format)
    keys = [f"{key}: " for key in (*found.files, *found.images)] or ["a folder a task" if card == "mme" else "?"]
    assert any(key in told for key in keys) and "{split}" not in told


def test_a_benchmark_without_any_picture_is_refused_unless_that_is_said(benchmark_of, data: Path, caplog) -> None:
    path = data / "tiny" / "test.jsonl"
    benchmarks._tell.cache_clear()  # a line is told once a process
    with caplog.at_level("INFO"):
        benchmark_of().read(data)
    assert "tiny: pictures in 30 of 32 samples" in caplog.text
    path.write_text(path.read_text(encoding="utf-8").replace('"image"', '"image_path"'), encoding="utf-8")
    with pytest.raises(DataError, match="pictures in 0 of 32 samples; keys or columns not used: image_path"):
        benchmark_of().read(data)
    assert len(benchmark_of(text_only=True).read(data)) == 32

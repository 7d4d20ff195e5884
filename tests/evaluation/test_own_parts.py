"""A user's own format, parser and metric, in a module outside mmkd: trained on, asked and scored by cards that import it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from layouts import picture

from mmkd.data.entries import read_samples
from mmkd.data.fingerprint import fingerprint
from mmkd.data.spec import DataSpec
from mmkd.errors import MmkdError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.registry import registry

MODULE = '''
from mmkd.data.formats import Format
from mmkd.data.samples import Question
from mmkd.evaluation.metric import Metric
from mmkd.registry import register


@register("formats", "semicolons")
class Semicolons(Format):
    """Lines of picture;question;level;answer."""

    files = {"annotations": "{split}.txt"}
    images = {"images": "pictures"}

    def read(self, source):
        for number, line in enumerate(source.path("annotations").read_text().splitlines()):
            picture, question, level, answer = line.split(";")
            image = source.image(picture, where=f"line {number}")
            fields = {"references": (answer,), "categories": {"level": level}}
            yield Question(f"{source.split}-{number}", question, (image,), answer, **fields)


@register("parsers", "last_word")
def last_word(text):
    """The last word of the answer."""
    return text.split()[-1].strip(".") if text.split() else None


@register("metrics", "starts_alike")
def starts_alike(prediction, references):
    """1.0 when the answer begins as a reference does."""
    return float(any(prediction.startswith(reference[:2]) for reference in references))


@register("metrics", "by_level")
class ByLevel(Metric):
    """Case does not matter in hard questions."""

    def score(self, answer, question):
        hard = question.categories["level"] == "hard"
        return float((answer.lower() if hard else answer) in question.references)

    def aggregate(self, rows):
        return {"hard_right": sum(row["score"] for row in rows if row["categories"]["level"] == "hard")}
'''
LINES = ["a.png;What is it?;hard;cat", "a.png;What colour?;easy;red", "b.png;What is it?;hard;dog", "b.png;Is it old?;easy;no"]
NAMES = (("formats", "semicolons"), ("parsers", "last_word"), ("metrics", "starts_alike"), ("metrics", "by_level"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the module, cards and data; what the module registered is forgotten afterwards."""
    (tmp_path / "own_parts.py").write_text(MODULE, encoding="utf-8")
    root = tmp_path / "set"
    for shade, name in enumerate(("a.png", "b.png")):
        picture(root / "pictures" / name, 50 * shade)
    (root / "test.txt").write_text("\n".join(LINES), encoding="utf-8")
    card = {
        "imports": ["own_parts"], "title": "mine", "format": "semicolons", "root": "set", "split": "test",
        "prompt_style": "short", "parser": "last_word", "metric": "by_level", "also": ["starts_alike"], "categories": ["level"],
    }  # fmt: skip
    data = {"imports": ["own_parts"], "title": "mine", "format": "semicolons", "root": "set", "prompt": "short"}
    for kind, content in (("evaluation", card), ("data", data)):
        (tmp_path / "cards" / kind).mkdir(parents=True)
        (tmp_path / "cards" / kind / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setenv("MMKD_CARDS", str(tmp_path / "cards"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_parts", None)
    for kind, name in NAMES:
        registry(kind).remove(name)


def test_they_are_unknown_until_a_card_imports_them(own: Path) -> None:
    path = own / "cards" / "evaluation" / "mine.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("own_parts", "no_such_module"), encoding="utf-8")
    with pytest.raises(MmkdError, match="no_such_module"):
        load_benchmark("mine")
    with pytest.raises(ValueError, match="there is no format 'semicolons'"):
        DataSpec(format="semicolons", root="set")


def test_a_benchmark_of_them_is_asked_and_scored(own: Path, fake_tower) -> None:
    tower = fake_tower({"test-0": "It is a CAT.", "test-1": "I see Red", "test-2": "a dot", "test-3": "It is no."})
    results = evaluate(tower, load_benchmark("mine"), own / "out", data_root=own, progress=False)
    rows = [json.loads(line) for line in (own / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["parsed"], row["score"]) for row in rows] == [("CAT", 1.0), ("Red", 0.0), ("dot", 0.0), ("no", 1.0)]
    assert results["score"] == 0.5 and results["hard_right"] == 1.0
    assert [row["also"]["starts_alike"] for row in rows] == [0.0, 0.0, 1.0, 1.0]
    assert results["by"]["level"]["easy"]["n"] == 2 and (results["metric"], results["parser"]) == ("by_level", "last_word")


def test_the_same_format_is_trained_on(own: Path) -> None:
    spec = DataSpec(card="mine", split="test")
    samples = read_samples(spec, 0, str(own))
    assert [sample.answer for sample in samples] == ["cat", "red", "dog", "no"]
    assert samples[0].turns[0].text.startswith("What is it?\nAnswer the question")
    assert samples[0].images[0].load().size == (8, 8)
    assert list(fingerprint(spec, str(own))["files"]) == ["test.txt"]
    registered = DataSpec(format="semicolons", root=str(own / "set"), split="test", limit=2)
    assert len(read_samples(registered, 0)) == 2


def test_they_are_listed_like_those_of_mmkd(own: Path) -> None:
    load_benchmark("mine")
    about = registry("formats").about("semicolons")
    assert (about.source, about.summary) == ("own_parts:Semicolons", "Lines of picture;question;level;answer.")
    assert about.options == ("annotations", "images")
    assert registry("metrics").about("by_level").summary == "Case does not matter in hard questions."
    assert registry("parsers").about("last_word").options == ()

"""Answers about things that are not in the picture: the rule, the embedded sample's truth, a whole evaluation, two runs."""

import json
import random
from dataclasses import replace

import pytest

from mmkd.data.formats import read_questions
from mmkd.data.samples import Question
from mmkd.data.scenes import caption, draw_scene, things_of_caption
from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.hallucination import compare, hallucinated, main
from mmkd.evaluation.metric import metric_of
from mmkd.evaluation.results import read_results
from mmkd.sample.sample_set import write_sample_set

SHOWN = Question("q", "?", shown=("red", "circle", "blue", "white", "lake"), categories={"category": "sign color"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("blue", 0), ("red", 0), ("The circles.", 0), ("LAKE", 0),  # right or another thing that is there
        ("green", 1), ("squares", 1), ("cake", 1), ("lakc", 1), ("7", 1),  # named, and nowhere
        ("", 0), (None, 0), ("a", 0),  # claims nothing
        ("a red circle", 0), ("it is a red square", 1), ("the sign says lake", 0), ("the sign says stop", 1),
    ],
)  # fmt: skip
def test_the_rule(answer, expected):
    assert hallucinated(answer, SHOWN) == expected


def test_what_cannot_be_told_is_left_out():
    assert hallucinated("9", replace(SHOWN, categories={"category": "count"})) is None
    assert hallucinated("red", replace(SHOWN, shown=())) is None


def test_yes_where_nothing_is():
    absent, there = Question("a", "?", references=("no",)), Question("b", "?", references=("yes",))
    assert [metric_of("pope").hallucinated(said, absent) for said in ("yes", "no", None)] == [1, 0, 0]
    assert metric_of("pope").hallucinated("yes", there) is None


def test_an_answer_is_made_up_when_it_claims_what_is_not_there():
    absent = Question("a", "is there not a red shape?", references=("yes",), shown=("blue", "circle"), claims={"no": "red"})
    assert [hallucinated(said, absent) for said in ("No.", "yes", "", None)] == [1, 0, 0, 0]
    assert hallucinated("no", replace(absent, shown=("red",), references=("no",))) is None
    assert hallucinated("yes", replace(absent, claims={})) is None  # what it claims is not known
    asked = replace(absent, claims={}, references=("blue",))
    assert [hallucinated(said, asked) for said in ("blue", "circle", "red", "yes")] == [0, 0, 1, 1]


def test_captions_tell_everything_that_a_scene_shows():
    rng = random.Random(0)
    for _ in range(200):
        scene = draw_scene(rng, 0.7)
        thing, sign = scene.thing, scene.sign
        expected = {thing.shape, thing.color} | ({sign.fill, sign.letters, sign.text} if sign else set())
        assert set(things_of_caption(caption(scene))) == expected


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made_up") / "sample"
    write_sample_set(folder, sizes={"test": 12}, annotator_accuracy=1.0)
    return folder


class Says:
    """A model that gives every question the same answer, or the true one."""

    def __init__(self, answer=None):
        self.words = answer

    def answer(self, samples, *, max_new_tokens, vision_cache=None):
        return [self.words or s.meta["question"].references[0] for s in samples]

    def fingerprint(self):
        return str(self.words)

    def parameter_count(self):
        return {"total": 1, "active": 1}

    def footprint(self):
        return {"weight_bytes": 4, "dtype": "float32", "device": "cpu"}

    def token_count(self, texts):
        return len(texts)


def test_an_evaluation_reports_it_with_its_interval(root, tmp_path):
    benchmark = load_benchmark("sample_textvqa")
    questions = {q.id: q for q in benchmark.read(root)}
    plain = {q.id: q for q in read_questions("textvqa", root / "textvqa", "test")}
    assert all(questions[i].shown and not plain[i].shown for i in plain) and questions.keys() == plain.keys()
    told = [q for q in questions.values() if q.categories["category"] != "count"]
    for answer in (None, "purple"):
        found = evaluate(Says(answer), benchmark, tmp_path / str(answer), data_root=root, progress=False)
        rate = sum("purple" not in q.shown for q in told) / len(told) if answer else 0.0
        assert found["also"]["hallucinated"]["n"] == len(told) < len(questions)
        assert found["also"]["hallucinated"]["score"] == pytest.approx(rate)
        low, high = found["also"]["hallucinated"]["ci95"]
        assert low <= rate <= high
        read_results(tmp_path / str(answer) / "results.json")
        rows = [json.loads(line) for line in (tmp_path / str(answer) / "predictions.jsonl").read_text().splitlines()]
        assert {r["id"] for r in rows if "also" in r} == {q.id for q in told}


def test_two_runs_are_compared_question_by_question(root, tmp_path, capsys):
    benchmark = load_benchmark("sample_textvqa")
    for name, answer in (("purple", "purple"), ("right", None)):
        evaluate(Says(answer), benchmark, tmp_path / name, data_root=root, progress=False)
    found = compare(tmp_path / "purple", tmp_path / "right")
    assert found["after"]["score"] == 0 < found["before"]["score"] == pytest.approx(-found["difference"]["score"])
    assert found["difference"]["ci95"][1] < 0
    assert main([str(tmp_path / "purple"), str(tmp_path / "right")]) == 0
    assert "difference" in capsys.readouterr().out
    assert compare(tmp_path / "right", tmp_path / "right")["difference"]["score"] == 0


def test_runs_that_cannot_tell_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.jsonl").write_text('{"id": "1", "score": 1.0, "prediction": "x"}\n')
    with pytest.raises(DataError, match="no answer of .* can be told made up"):
        compare(tmp_path / "a", tmp_path / "b")
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 2 and "error:" in capsys.readouterr().err
    assert main([]) == 2

"""Scorers and parsers: values worked out by hand, the official quirks among them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation import scorers
from mmkd.evaluation.parsers import gqa_parse, letter_exact, mmmu_parse, scienceqa_index, scienceqa_parse_lenient
from mmkd.evaluation.scorers import (
    anls,
    aokvqa_accuracy,
    exact_match,
    mme,
    mme_parse,
    mmmu_open,
    normalise_evalai,
    normalise_vqav2,
    pope,
    pope_parse,
    references_of,
    relaxed_accuracy,
    scienceqa,
    scienceqa_parse,
    stvqa_accuracy,
    textvqa_accuracy,
    vqa_accuracy,
)

CASES = Path(os.environ.get("MMKD_SCORER_CASES", Path(__file__).parents[3] / "shared" / "data" / "scorers"))


def ten(*parts: tuple[str, int]) -> list[str]:
    """References from (text, how often), filled up to ten with answers nobody gives."""
    given = [text for text, count in parts for _ in range(count)]
    return given + [f"filler{i}" for i in range(10 - len(given))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog!", "dog"),
        ("an apple, a pear", "apple pear"),
        ("seven", "7"),
        ("None", "0"),
        ("red/green", "red green"),  # no space beside the mark: it becomes one
        ("red / green", "red green"),  # a space beside it: it goes
        ("re-do 1,5", "redo 15"),  # a comma between digits removes every mark
        ("re-do 15", "re do 15"),
        ("2.5 km.", "2.5 km"),
        ("3:15 o'clock", "3:15 o'clock"),  # colon and apostrophe are no punctuation here
        ("youve", "you've"),
        ("shouldntve", "shouldntve"),  # only one apostrophe may be missing
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("." * 40, "." * 8),  # only 32 periods are removed
        ("\tx \n y ", "x y"),
    ],
)
def test_normalise_vqav2(text: str, expected: str) -> None:
    assert normalise_vqav2(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bob's  car", "bob 's car"),
        ("1,5/7", "15 7"),  # the comma is gone before marks are looked at, so the slash becomes a space
        ("what?!", "what"),
        ("wheres", "where's"),
        ("'tis", "'tis"),
        ("u.k.", "uk"),
    ],
)
def test_normalise_evalai(text: str, expected: str) -> None:
    assert normalise_evalai(text) == expected


@pytest.mark.parametrize("metric", [vqa_accuracy, textvqa_accuracy])
@pytest.mark.parametrize(
    ("count", "expected"),
    # n matches of ten: n times min(1, (n-1)/3), else min(1, n/3)
    [(0, 0.0), (1, 9 / 30), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1.0), (9, 1.0)],
)
def test_soft_accuracy_leaves_each_reference_out(metric, count: int, expected: float) -> None:
    assert metric("Two dogs.", ten(("two dogs", count))) == pytest.approx(expected)


def test_vqav2_normalises_only_where_references_differ() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0  # white space goes first
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1.0


def test_soft_accuracy_refuses_too_few_references() -> None:
    with pytest.raises(DataError, match="exactly 10 references, got 1"):
        textvqa_accuracy("yes", ["yes"])
    with pytest.raises(DataError, match="got 3"):
        vqa_accuracy("yes", ["yes"] * 3)


def test_references_are_normalised_once() -> None:
    references = ten(("once", 5))
    textvqa_accuracy("once", references)
    before = scorers._evalai_references.cache_info()
    textvqa_accuracy("other", references)
    after = scorers._evalai_references.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_stvqa_accuracy() -> None:
    assert stvqa_accuracy("The Ace", ["king", "ace."]) == 1.0
    assert stvqa_accuracy("aces", ["ace"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("10.5", "10", 1.0),
        ("10.51", "10", 0.0),
        ("-9.5", "-10", 1.0),
        ("0.2", "20%", 1.0),
        ("20", "20%", 0.0),
        ("0", "0.0", 0.0),  # a target of zero needs the same string
        ("0.0", "0.0", 1.0),
        ("2,000", "2000", 0.0),
        ("NORTH", "north", 1.0),
        ("nan", "nan", 0.0),
        ("1e2", "100", 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == expected


def test_relaxed_accuracy_takes_the_best_reference() -> None:
    assert relaxed_accuracy("7", ["six", "7.1"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ax"], 0.5),  # exactly one half counts
        ("abc", ["xyc"], 0.0),
        (" ABC ", ["abc"], 1.0),
        ("a  b", ["a b"], 0.75),  # inner spaces count
        ("", [""], 0.0),
        ("x", [""], 0.0),
        ("tea", ["coffee", "team"], 0.75),
    ],
)
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


def test_anls_without_references() -> None:
    with pytest.raises(DataError, match="at least one reference"):
        anls("x", [])


def test_exact_match() -> None:
    assert exact_match(" Blue  whale\n", ["shark", "blue whale"]) == 1.0
    assert exact_match("blue whale.", ["blue whale"]) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        ("C.", None),
        ("C. because", "C"),
        ("C ", None),
        ("c", None),
        ("The answer is C.", "C"),
        ("The answer is C", None),  # one more character is needed
        ("The answer is C?", "C"),
        ("The answer is Cats.", "C"),  # any character will do
        ("The answer is C.\nThe answer is C.", None),
        ("the answer is C.", None),
        ("The answer is Z.", "Z"),
        ("E", "E"),
        ("F", None),
        ("", None),
        (None, None),
    ],
)
def test_scienceqa_strict(text: str | None, expected: str | None) -> None:
    assert scienceqa_parse(text, 4) == expected


def test_a_letter_beyond_the_choices_is_parsed_and_wrong() -> None:
    assert scienceqa_parse("D", 2) == "D"
    assert scienceqa_index("D", 2) == -1
    assert scienceqa_index("B", 2) == 1
    assert scienceqa_index(None, 2) == -1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B Explanation: it is cold", "B"),
        ("(c) a dog", "C"),
        ("**B**", "B"),
        ("b", "B"),
        ("Answer: (C)", "C"),
        ("I think the answer is B, since ...", "B"),
        ("The answer is A. The answer is B.", None),
        ("The answer is A. So the answer is B.", "A"),  # the strict rule finds one: it stands
        ("The answer is B. Yes, the answer is B.", "B"),
        ("A dog is barking", None),  # an article
        ("A", "A"),
        ("The answer is a dog", None),
        ("north pole", "C"),  # the words of the third choice
        ("It cannot be said.", None),
        ("D", None),  # beyond the choices
        ("Because of the cold", None),
    ],
)
def test_scienceqa_lenient(text: str, expected: str | None) -> None:
    assert scienceqa_parse_lenient(text, 3, ["sea", "land", "North Pole."]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No, there is none", "no"),
        ("Yes. No", "yes"),  # the first sentence only
        ("It is not", "no"),
        ("nothing", "yes"),
        ("NO", "yes"),
        ("", "yes"),
        ("well,no", "yes"),
        ("yes\nno", "yes"),  # only spaces part words
    ],
)
def test_pope_parse(text: str, expected: str) -> None:
    assert pope_parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YES!", "yes"),
        ("  no", "no"),
        ("   no", "other"),
        ("nose", "no"),
        ("I'd say yes", "other"),
        ("", "other"),
    ],
)
def test_mme_parse(text: str, expected: str) -> None:
    assert mme_parse(text) == expected


def test_pope() -> None:
    result = pope(["yes", "yes", "no", "No.", "Yes"], ["yes", "no", "no", "yes", "yes"])
    assert result == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    assert pope(["no"], ["no"])["f1"] == 0.0
    with pytest.raises(DataError, match="2 predictions for 1 labels"):
        pope(["yes", "no"], ["yes"])
    with pytest.raises(DataError, match="maybe"):
        pope(["yes"], ["maybe"])


def test_mme() -> None:
    rows = [("a", "Yes", "Yes"), ("a", "no", "No"), ("b", "yes", "Yes"), ("b", "perhaps", "No")]
    result = mme({"color": rows, "count": rows[:2]})
    assert result["color"] == pytest.approx({"acc": 0.75, "acc_plus": 0.5, "score": 125.0})
    assert result["count"]["score"] == 200.0
    assert result["total"]["score"] == 325.0
    with pytest.raises(DataError, match="two questions an image"):
        mme({"color": rows[:3]})


def test_scienceqa_breakdown() -> None:
    def row(score: float, modality: str, subject: str, grades: str, parsed: str | None = "A") -> dict:
        labels = {"modality": modality, "subject": subject, "grades": grades}
        return {"score": score, "parsed": parsed, "categories": labels}

    rows = [
        row(1, "image", "natural science", "1-6"),
        row(0, "image", "natural science", "7-12", None),
        row(1, "text", "language science", "1-6"),
    ]
    result = scienceqa(rows)
    assert result["all"] == pytest.approx({"n": 3, "score": 2 / 3, "unparsed_share": 1 / 3})
    assert result["image"] == {"n": 2, "score": 0.5, "unparsed_share": 0.5}
    assert result["grades 7-12"]["score"] == 0.0
    assert set(result) == {
        "all",
        "image",
        "text",
        "natural science",
        "language science",
        "grades 1-6",
        "grades 7-12",
    }


def test_references_of() -> None:
    question = Question("1", "?", answer="b", references=("b",), choices=("a", "b"), answer_index=1)
    assert references_of(question, by_letter=True) == ("B",)
    assert references_of(question, by_letter=False) == ("b",)
    assert references_of(Question("2", "?"), by_letter=False) == ()
    assert references_of(Question("3", "?", choices=("a", "b")), by_letter=True) == ()


def test_aokvqa_counts_equal_answers() -> None:
    answers = ["cat", "cat", "dog", "Cat"]
    assert aokvqa_accuracy("cat", answers) == pytest.approx(2 / 3)
    assert aokvqa_accuracy("CAT", answers) == 0.0


@pytest.mark.parametrize(
    ("text", "references", "right"),
    [
        ("The answer is 12", ["12"], True),
        ("so x = 12.004", ["12.00"], True),  # numbers are rounded to two places
        ("1,200", ["1200"], True),
        ("12", ["120"], False),
        ("it is blue whale", ["whale"], True),
        ("b", ["b"], True),
        ("grade b it is done", ["b"], False),  # only what follows the last mark counts
        ("the grade is a b", ["b"], True),
        ("whale.", ["Whale", "fish"], True),
        ("", ["x"], False),
        ("nan", ["nan"], False),
    ],
)
def test_mmmu_open_questions(text: str, references: list[str], right: bool) -> None:
    assert mmmu_open(text, references) == float(right)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(A) or (C)", "C"),
        ("A (B)", "B"),  # brackets come first
        ("I say A not B here", "B"),
        ("B.", "B"),
        ("it must surely be the green one", "B"),
        ("green one", None),  # too short for the words of a choice
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(text: str, letter: str | None) -> None:
    assert mmmu_parse(text, ("red", "green", "blue")) == letter


def test_mmmu_leaves_open_answers_alone() -> None:
    assert mmmu_parse(" 12. ", ()) == " 12. "


def test_letters_alone_and_gqa() -> None:
    assert [letter_exact(text, 2) for text in ("A", "B", "C", "A.", "", "AB")] == ["A", "B", None, None, None, None]
    assert gqa_parse("Yes..") == "yes"


# ---- the official scorers' own answers, where they are at hand
# ---------------------------------------------------


def _check(name: str, case: dict) -> tuple[object, object]:
    """(what we say, what the official scorer says) of one case."""
    if name == "scienceqa_llava":
        letter = scienceqa_parse(case["prediction"], case["num_choices"])
        index = scienceqa_index(letter, case["num_choices"])
        ours = {"parsed": letter or "FAILED", "index": index, "correct": index == case["label"]}
        return ours, case["expected"]
    if name.endswith("_normalise"):
        return {"textvqa_evalai_normalise": normalise_evalai, "vqav2_normalise": normalise_vqav2}[name](
            case["text"]
        ), case["expected"]
    if name.endswith("_parse"):
        return {"pope_parse": pope_parse, "mme_parse": mme_parse}[name](case["prediction"]), case["expected"]
    metrics = {
        "vqav2_soft_accuracy": vqa_accuracy,
        "textvqa_evalai_accuracy": textvqa_accuracy,
        "stvqa_accuracy": stvqa_accuracy,
        "chartqa_relaxed": relaxed_accuracy,
        "anls": anls,
    }
    expected = case["expected"]["docvqa_mp_docvqa_evaluator"] if name == "anls" else float(case["expected"])
    return metrics[name](case["prediction"], case["references"]), pytest.approx(expected, abs=1e-9)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no official cases in {CASES} (set MMKD_SCORER_CASES)")
def test_official_cases() -> None:
    files = sorted(CASES.glob("*.jsonl"))
    wrong, count = [], 0
    for path in files:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                case = json.loads(line)
                ours, official = _check(path.stem, case)
                count += 1
                wrong += [] if ours == official else [(case, ours)]
    assert not wrong
    assert len(files) == 10 and count >= 500

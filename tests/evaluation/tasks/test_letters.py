"""Letters: the strict rule and its quirks, and what a reader would take."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.gqa import gqa_parse
from mmkd.evaluation.tasks.letters import scienceqa_index, scienceqa_parse, scienceqa_parse_lenient
from mmkd.evaluation.tasks.seed import letter_exact


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
        ("L", "L"), ("l", "L"), ("(l)", "L"), ("L.", "L"), ("l. pear", "L"), ("(L) pear", "L"), ("Option L", "L"),
        ("I", "I"), ("(I)", "I"), ("i.", "I"), ("I am not sure", None),  # a word
        ("I think the answer is (L).", "L"),
        ("M", None), ("kiwi 11", "L"),
    ],
)  # fmt: skip
def test_twelve_choices(text: str, expected: str | None) -> None:
    assert scienceqa_parse_lenient(text, 12, [f"kiwi {n}" for n in range(12)]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{B}", "B"), (r"First A, then B: $\boxed{\text{B}}$.", "B"), (r"\boxed{(b) land}", "B"),
        (r"\boxed{North Pole}", "C"),
        (r"It was A. Hence \boxed{\mathrm{C}}", "C"), (r"\boxed{A} or \boxed{B}", None), (r"\boxed{42}", None),
        (r"\boxed{42}, so the answer is B", "B"), ("[[B]]", "B"), ("[[A]]", "A"), ("{a}", "A"), ("<C>", "C"), ("<Cat>", None),
    ],
)  # fmt: skip
def test_letters_in_boxes_and_brackets(text: str, expected: str | None) -> None:
    assert scienceqa_parse_lenient(text, 3, ["sea", "land", "North Pole."]) == expected


def test_the_strict_rule_knows_as_many_letters_as_choices() -> None:
    assert [scienceqa_parse(text, 7) for text in ("G", "G. pear", "G.", "g", "H")] == ["G", "G", None, None, None]
    assert scienceqa_parse("F", 5) is None and scienceqa_index("G", 7) == 6 and scienceqa_index("G", 6) == -1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("答案应为C。", "C"), ("正确答案是：（Ｃ）", "C"), ("我的答案是“C”", "C"), ("应该选择c", "C"), ("因此，本题选C。", "C"),
        ("【答案】C", "C"), ("【C】", "C"), ("ｃ．", "C"), ("C、鸟", "C"), ("A、猫", "A"), ("A 猫", "A"), ("A是正确的", "A"),
        ("選項C", "C"), ("正確選項為C", "C"), ("图中是鸟，所以答案就是C", "C"), ("鸟。", "C"),
        ("不选A，选C", "C"), ("不应选A，故选C", "C"), ("选项A是猫，选项B是狗，答案是C", "C"),
        ("选项C正确", "C"), ("選項A是錯的，選項C是對的", "C"), ("选项A是不对的", None), ("选项A对，选项C对", None),
        ("选A和C", None), ("答案是AC", None), ("选A。选C", None), ("答案是A、C", None),
        ("A型血", None), ("C罗在踢球", None), ("选CD机", None), ("答案是鸟类", None), ("这个选项不对", None), ("答案是F", None),
    ],
)  # fmt: skip
def test_chinese_statements(text: str, expected: str | None) -> None:
    assert scienceqa_parse_lenient(text, 4, ["猫", "狗", "鸟", "鱼"]) == expected


def test_letters_alone_and_gqa() -> None:
    assert [letter_exact(text, 2) for text in ("A", "B", "C", "A.", "", "AB")] == ["A", "B", None, None, None, None]
    assert gqa_parse("Yes..") == "yes"

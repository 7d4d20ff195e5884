"""MATH-Vision's rules, by hand from the authors' script."""

from __future__ import annotations

import pytest

from mmkd.evaluation.tasks.math_vision import math_answer, math_equal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{D}", "d"),
        ("So $x = 3$, and \\boxed{\\frac{1}{2}} follows, but no: \\boxed{ (C) }", "c"),
        ("The sum is 11.", "11"),
        ("I think that it must be B.", "b"),
        ("It is (E).", "e"),
        ("A\nsince the others fail", "a"),
        ("Hence the answer is 12 apples. And more", "12apples"),
        ("The final answer is: 7\nbye", "7"),
        ("\\boxed{x = 4\\text{km}}", "4"),
        ("\\boxed{50^\\circ}", "50"),
        (".5", "0.5"),
        ("\\boxed{.5}", "0.5"),
        ("", ""),
    ],
)
def test_the_answer_of_a_solution(text: str, expected: str) -> None:
    assert math_answer(text) == expected


def test_as_many_letters_as_options() -> None:
    seven = ["1", "2", "3", "4", "5", "6", "7"]
    assert [math_answer(text, seven) for text in ("It must be G.", "(G)", "So \\boxed{(G)}", "f(x)")] == ["g", "g", "g", "f(x)"]
    assert math_answer("(G)", seven[:5]) == "(g)"


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("d", ["D"], 1),
        ("2", ["B", "$2$"], 1),  # the option's own words
        ("b", ["B", "$2$"], 1),
        ("0.5", ["\\frac{1}{2}"], 1),
        ("-1/3", ["-\\frac{1}{3}"], 1),
        ("2\\sqrt{3}", ["3.464"], 1),  # to two places
        ("3\\pi", ["9.42"], 1),
        ("1,000", ["1000"], 1),
        ("4.80", ["4.8"], 1),
        ("4.79", ["4.8"], 0),
        ("1/0", ["1"], 0),
        ("", [""], 0),
        ("nan", ["1"], 0),
        ("x+1", ["1+x"], 0),  # needs algebra: counts as wrong
    ],
)
def test_equal_values(answer: str, references: list[str], right: int) -> None:
    assert math_equal(answer, references) == right

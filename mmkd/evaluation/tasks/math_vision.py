"""MATH-Vision's answers: what a solution ends in, and whether two expressions have the same value.

The steps of the authors' `evaluate.py` and `utils.py` (mathllm/MATH-V) on plain answers. Their library for LaTeX is replaced by
a small reader of numbers, fractions, roots and pi, rounded to two places as theirs; whatever it cannot read is compared as text.
Strict in this: an expression that only a computer algebra system could compare counts as wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from string import ascii_uppercase

from mmkd.registry import register

_FEWEST = 5  # the authors' script knows the letters A to E
_STATED = tuple(
    form for text in ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
    for form in (text, text.replace("the", "The"))
)  # fmt: skip
_DROPPED = (" ", "\\,", "\n", "\\text", "\\mbox", "\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3", "{units}", "units",
            "{km}", "km", "\\!", "\\$", "$", "\\%")  # fmt: skip
_FRACTION = re.compile(r"\\[td]?frac\{([^{}]+)\}\{([^{}]+)\}")
_ROOT = re.compile(r"\\sqrt\{([^{}]+)\}")
_PRODUCT = re.compile(r"[-+]?[\d.]*(?:√[\d.]+|π)?")


@register("parsers", "math")
def math_answer(text: str, choices: Sequence[str] = ()) -> str:
    """The answer in a solution: a letter that it ends or begins with, what is boxed, or what "the answer is". In lower case."""
    answer = text.strip()
    letters = ascii_uppercase[: max(_FEWEST, len(choices))]
    for letter in letters:
        ends = (f" {letter}.", f" ({letter}).")
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if answer.endswith(ends) or answer.startswith(starts):
            answer = letter
    number = answer.split("is ")[-1].rstrip(".")
    if _float(number) is not None:
        answer = number
    if "oxed{" not in answer:
        for stated in _STATED:
            if stated in answer:
                answer = answer.split(stated)[-1].strip().split("\n")[0].split(". ")[0]
    answer = _plain(answer.lower())
    for letter in letters.lower():
        answer = answer.replace(f"({letter})", letter).replace(f"{{{letter}}}", letter)
    return answer.rstrip(".").lstrip(":").strip()


def _plain(text: str) -> str:
    """The last boxed part (else the whole), behind its equals sign, without LaTeX's spaces, units and signs."""
    if "oxed{" in text:
        text = _inside_braces(text.split("oxed{")[-1])
    text = text.replace("{}", "").split("=")[-1].split("\\approx")[-1]
    for mark in _DROPPED:
        text = text.replace(mark, "")
    return "0" + text if text.startswith(".") else text


def _inside_braces(text: str) -> str:
    """Up to the brace that closes what was opened before `text`."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


@register("metrics", "math")
def math_equal(answer: str, references: Sequence[str]) -> float:
    """1.0 when an answer is one of the references as text, or has its value to two places; an empty answer is never right."""
    return float(any(_equal(answer.lower().strip(), reference.lower().strip()) for reference in references))


def _equal(answer: str, reference: str) -> bool:
    if not answer or not reference:
        return False
    if answer == reference:
        return True
    values = [_value(text) for text in (answer, _plain(reference))]
    return None not in values and round(values[0], 2) == round(values[1], 2)


def _value(text: str) -> float | None:
    """The value of a number, a fraction or a product of a number with a root or pi; None for anything else."""
    text = _ROOT.sub(r"√\1", text.replace("\\pi", "π"))
    found = re.fullmatch(r"([-+]?)" + _FRACTION.pattern, text)
    if found:
        sign, top, bottom = found.groups()
        text = f"{sign}{top}/{bottom}"
    parts = [_product(part) for part in text.replace(",", "").split("/")]
    if None in parts or len(parts) > 2:
        return None
    if len(parts) == 1:
        return parts[0]
    return parts[0] / parts[1] if parts[1] else None


def _product(text: str) -> float | None:
    number = _float(text)
    if number is not None or not text or not _PRODUCT.fullmatch(text):
        return number
    factor = re.match(r"[-+]?[\d.]*", text)[0]
    value = {"": 1.0, "+": 1.0, "-": -1.0}.get(factor, _float(factor))
    rest = text[len(factor) :]
    other = math.pi if rest == "π" else _float(rest[1:])
    return None if value is None or other is None else value * (other if rest == "π" else math.sqrt(other))


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

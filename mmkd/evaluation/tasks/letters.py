"""Letters of choices, as many as there are choices: LLaVA's strict rule, and what a human reader would take from a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import NamedTuple

from mmkd.evaluation.metric import Parser
from mmkd.registry import register

_FEWEST = 5  # LLaVA's script knows the letters A to E, however few choices there are

# The trailing dot is a wildcard in LLaVA's own pattern: one more character is needed, any but a line break.
_STRICT = re.compile(r"The answer is ([A-Z]).")

_WORDS = "AI"  # letters that are also English words
_HAN = "\u3400-\u9fff"
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_INNER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm)\s*\{([^{}]*)\}")
_DECORATION = re.compile(r"</?s>|<\|[^|<>]*\|>|[*_`\"]")
# Full-width letters, brackets and marks -> their plain forms.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("【"): "(", ord("】"): ")"}

# "the answer is", "the right option is", "choose", unless negated. Simplified and traditional.
_CHINESE = (
    r"(?:答案|正[确確]的?[选選][项項]|(?<![不别別勿])(?<![不][能要该該应應会會])[选選][择擇]?(?![项項])"
    r"|[选選][项項](?=\s*[A-Za-z]\s*(?:是|为|為)?(?:正[确確]|对|對)))"
)
_CHINESE_FILLER = r"[应應该該当當就选選择擇项項是为為的:\s)“‘(\[「『《]*"


def letters_of(num_choices: int) -> str:
    """The letters that an answer to so many choices may name."""
    return ascii_uppercase[: max(_FEWEST, num_choices)]


def scienceqa_parse(text: str | None, num_choices: int) -> str | None:
    """The letter by LLaVA's strict rule (`llava/eval/eval_science_qa.py`), or None where it says FAILED.

    Accepted are exactly: a bare capital letter without any white space; such a letter followed by a
    period and a space; or one single occurrence of "The answer is X" followed by any one character.
    Quirks kept: " A", "A.", "(A)" and "a" fail; "The answer is AB." is A; a stated answer found twice
    fails, even when it is the same both times.

    As in the official code `num_choices` does not limit the letters A to E: "D" of two choices is parsed, and wrong;
    `scienceqa_index` makes -1 of it. ScienceQA has at most five choices. Where there are more, so are the letters.
    """
    if text is None:
        return None
    letters = tuple(letters_of(num_choices))
    if text in letters:
        return text
    if text[:1] in letters and text[1:3] == ". ":
        return text[0]
    stated = _STRICT.findall(text)
    return stated[0] if len(stated) == 1 else None


def scienceqa_index(letter: str | None, num_choices: int) -> int:
    """The position of a letter among the first `num_choices` letters, else -1."""
    allowed = tuple(ascii_uppercase[:num_choices])
    return allowed.index(letter) if letter in allowed else -1


def scienceqa_parse_lenient(text: str | None, num_choices: int, choices: Sequence[str] = ()) -> str | None:
    """The letter a human reader would take from the text, or None; never the headline.

    In this order, special tokens and markdown marks being removed and full-width characters made plain from 2. on:
    1. what the strict rule finds;
    2. the text is one of the `choices`, word for word (case and a final period do not matter);
    3. "\\boxed{X}", "\\boxed{\\text{X}}", or a choice in a box: all boxes must agree;
    4. "答案是X", "故选X", "正确选项为（X）": all that are stated must agree;
    5. "answer is X", "Answer: (X)", "option X", "选项X": the same;
    6. a letter at the head: "(B) dog", "[[B]]", "B: dog", "b.", "B Because ...", "B是正确的".
    Small letters, and "A" and "I" (words), count in 5. and 6. only with a delimiter or the end after them.  A letter beyond
    `num_choices` is None.
    """
    if text is None:
        return None
    letter = scienceqa_parse(text, num_choices) or _read_letter(_plain(text), num_choices, choices)
    return letter if scienceqa_index(letter, num_choices) >= 0 else None


def _read_letter(text: str, num_choices: int, choices: Sequence[str]) -> str | None:
    if letter := _choice_letter(text, choices):
        return letter
    boxes = [_INNER.sub(r"\1", box).strip() for box in _BOXED.findall(text)]
    boxed = {letter for box in boxes if (letter := _choice_letter(box, choices) or _found_letter(box, num_choices))}
    if boxed:
        return boxed.pop() if len(boxed) == 1 else None
    return _found_letter(text, num_choices)


class StrictLetters(Parser):
    """A rule that takes letters only as its authors' script does; the score by a reader's rule stands beside it."""

    has_lenient = True

    def lenient(self, text: str, choices: Sequence[str]) -> str | None:
        return letter(text, choices)


@register("parsers", "letter")
def letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that a human reader would take from the text, in English or Chinese."""
    return scienceqa_parse_lenient(text, len(choices), choices)


def _plain(text: str) -> str:
    return _DECORATION.sub("", text.translate(_PLAIN)).strip()


def _choice_letter(text: str, choices: Sequence[str]) -> str | None:
    wanted = text.casefold().rstrip(".。")
    plain = [choice.translate(_PLAIN).strip().casefold().rstrip(".。") for choice in choices]
    matches = [i for i, choice in enumerate(plain) if choice == wanted]
    return ascii_uppercase[matches[0]] if wanted and len(matches) == 1 else None


class _Patterns(NamedTuple):
    chinese: re.Pattern
    stated: re.Pattern
    leading: re.Pattern


@lru_cache(maxsize=26)
def _patterns(letters: str) -> _Patterns:
    """What finds one of these capital letters; the letter is the match's one group that is not empty."""
    plain = "".join(letter for letter in letters if letter not in _WORDS)
    # Letters that are words and small ones need a delimiter after them; Chinese writes no space after it.
    delimited = "".join(letter for letter in letters if letter in _WORDS) + letters.lower()
    delimiter = rf"(?=\s*(?:[).:,;!\]}}>。、](?![^\W{_HAN}])|\n|$))"
    one = rf"(?:([{plain}])(?![\w'])|([{delimited}]){delimiter})"
    any_case = letters + letters.lower()
    several = rf"(?!\s*[、和或与與及]\s*(?:[选選][项項]?)?[{any_case}](?![A-Za-z])|\s*,\s*[{any_case}]\s*(?:[.。]|$))"
    return _Patterns(
        chinese=re.compile(rf"{_CHINESE}{_CHINESE_FILLER}([{any_case}])(?![A-Za-z0-9_']){several}"),
        stated=re.compile(
            rf"(?:(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(?i:option|choice)?|[选選][项項]\s*)\s*[(\[]?{one}"
        ),
        leading=re.compile(
            rf"(?:option|choice)?\s*[(\[{{<]{{0,2}}{one}|[(\[]?([{letters}])(?=\s*(?:[选選]?[项項]|是|[正][确確])|\s+[{_HAN}])"
        ),
    )


def _found_letter(text: str, num_choices: int) -> str | None:
    patterns = _patterns(letters_of(num_choices))
    for pattern in (patterns.chinese, patterns.stated):
        stated = {"".join(filter(None, found.groups())).upper() for found in pattern.finditer(text)}
        if stated:
            return stated.pop() if len(stated) == 1 else None
    head = patterns.leading.match(text)
    return "".join(filter(None, head.groups())).upper() if head else None

"""Thinking in an answer: the marks that models put around it, and what is left without it.

An answer stands behind the last thinking block. Templates may open the block in the prompt, so that the answer holds the
closing mark alone, or none where it ends before that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

CLOSED, UNCLOSED = "closed", "unclosed"

# Opening and closing mark: Qwen, DeepSeek, GLM and many others; Mistral; Kimi; Cohere; Sky-T1 and LLaVA-style data; Seed;
# MiniMax; LongCat; others; Gemma 4.
PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|thought_begin|>", "<|thought_end|>"),
    ("<|channel>thought", "<channel|>"),
)
MARKS = frozenset(mark for pair in PAIRS for mark in pair) | {"<|channel>"}  # the token with which Gemma's mark begins
_FIRST = frozenset(mark[0] for mark in MARKS)

_OPEN, _CLOSE = (re.compile("|".join(map(re.escape, marks)), re.IGNORECASE) for marks in zip(*PAIRS, strict=True))
# What stands around the answer that follows a block: DeepSeek-R1's and its kin's, GLM's, Sky-T1's, Cohere's, LLaVA-CoT's.
_AROUND = re.compile(
    r"<answer>(.*)</answer>|<\|begin_of_box\|>(.*)<\|end_of_box\|>|<\|begin_of_solution\|>(.*)<\|end_of_solution\|>"
    r"|<\|START_RESPONSE\|>(.*)<\|END_RESPONSE\|>|<conclusion>(.*)</conclusion>",
    re.IGNORECASE | re.DOTALL,
)


def without_thinking(text: str, opened: bool = False) -> tuple[str | None, str | None]:
    """(answer, what its thinking is): what stands behind the last block, or before the first where nothing does.

    The thinking is None for a text without any, which stays as it is; CLOSED; or UNCLOSED, with None for the answer.
    `opened`: the prompt has opened a block already.
    """
    first, last = _OPEN.search(text), _last(_CLOSE, text)
    if first is None and last is None:
        return (None, UNCLOSED) if opened else (text, None)
    if ends_within(text):
        return None, UNCLOSED
    before = text[: first.start()] if first and first.start() < last.start() else ""
    answer = text[last.end() :].strip() or before.strip()
    inside = _AROUND.fullmatch(answer)
    return (next(part for part in inside.groups() if part is not None).strip() if inside else answer), CLOSED


def opening_of(text: str) -> str:
    """The mark with which a text opens a thinking block at its beginning, in small letters; "" where it does not."""
    small = text.lstrip().lower()
    return next((opening.lower() for opening, _ in PAIRS if small.startswith(opening.lower())), "")


def holds_thinking(text: str) -> bool:
    """Whether any mark of thinking stands in a text."""
    if not any(first in text for first in _FIRST):  # nearly always, and ten times as fast
        return False
    return bool(_OPEN.search(text) or _CLOSE.search(text))


def ends_within(text: str) -> bool:
    """Whether a text, such as a prompt, ends within a thinking block."""
    opening, closing = _last(_OPEN, text), _last(_CLOSE, text)
    return opening is not None and (closing is None or closing.start() < opening.start())


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def decode_answers(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts of answers without special tokens, but with thinking marks, which some tokenizers count among these."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {number: token.content for number, token in added.items() if token.special and token.content in MARKS}
    if not marks:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [_decode(tokenizer, row, marks) for row in rows]


def _decode(tokenizer: Any, ids: Sequence[int], marks: Mapping[int, str]) -> str:
    pieces: list[str] = []
    start = 0
    for place, number in enumerate(ids):
        if number in marks:
            pieces += [tokenizer.decode(ids[start:place], skip_special_tokens=True), marks[number]]
            start = place + 1
    return "".join([*pieces, tokenizer.decode(ids[start:], skip_special_tokens=True)])

"""What is wrong with answers as a whole, in words: a score does not say that a model answers nothing, or always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mmkd.evaluation.results import answer_of

FEWEST = 10  # answers of which something is said
EMPTY, UNPARSED, SAME = 0.1, 0.5, 0.9  # shares from which on it is said
LONGEST = 40  # characters of an answer that is shown


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """Sentences such as "118 of 120 answers are empty", "one answer makes 97 % of 120: 'yes'" and "0 of 120 right".

    rows: of a predictions.jsonl, without skipped ones. Nothing is said of fewer than 10, but where none or all are right. One
    answer is no remark where nearly as many questions have that as their reference.
    """
    return [*_of_texts([row for row in rows if "prediction" in row]), *_of_scores(rows)]


def _of_texts(rows: Sequence[Mapping]) -> list[str]:
    found, count = [], len(rows)
    # Of an answer that ends within its thinking, the thinking: it is not empty, but cannot be parsed.
    texts = [row.get("prediction") if answer_of(row) is None else answer_of(row) for row in rows]
    answers = [" ".join((text or "").split()) for text in texts]
    empty = answers.count("")
    if count >= FEWEST and empty >= EMPTY * count:
        found.append(f"{empty} of {count} answers are empty")
    unparsed = sum(bool(answer) and row.get("parsed", answer) is None for row, answer in zip(rows, answers, strict=True))
    if count >= FEWEST and unparsed >= UNPARSED * count:
        found.append(f"{unparsed} of {count} answers cannot be parsed")
    answer, times = Counter(map(str.casefold, filter(None, answers))).most_common(1)[0] if empty < count else ("", 0)
    if count >= FEWEST and times >= SAME * count and times > _references(rows, answer) + (1 - SAME) / 2 * count:
        shown = answer if len(answer) <= LONGEST else answer[: LONGEST - 1] + "…"
        found.append(f"one answer makes {100 * times / count:.0f} % of {count}: {shown!r}")
    return found


def _of_scores(rows: Sequence[Mapping]) -> list[str]:
    scores = [row.get("score") for row in rows]
    if scores and None not in scores and not any(scores):
        return [f"0 of {len(rows)} right"]
    return [f"{len(rows)} of {len(rows)} right"] if scores and all(score == 1 for score in scores) else []


def _references(rows: Sequence[Mapping], answer: str) -> int:
    """Questions of which this is a reference."""
    return sum(answer in {text.casefold() for text in row.get("references") or ()} for row in rows)

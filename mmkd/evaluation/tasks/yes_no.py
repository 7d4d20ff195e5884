"""Questions that are answered by yes or no: what a reader would take from an answer, and answers with neither word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmkd.evaluation.metric import Parser
from mmkd.evaluation.results import answer_of

_YES = re.compile(r"\byes\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|not|cannot)\b|n['’]t\b", re.IGNORECASE)
_FIRST = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def yes_or_no(text: str) -> str | None:
    """ "yes" or "no": the first word if it is one of them, else the only one that occurs ("not" is a no); None otherwise."""
    first = _FIRST.match(text)
    if first:
        return first[1].lower()
    yes, no = _YES.search(text), _NO.search(text)
    return None if bool(yes) == bool(no) else "yes" if yes else "no"


class YesNo(Parser):
    """An official rule that takes any text for one of the words; the score by a reader's rule stands beside it."""

    has_lenient = True

    def lenient(self, text: str, choices: Sequence[str]) -> str | None:
        return yes_or_no(text)


def neither_share(rows: Sequence[Mapping]) -> float:
    """Share of the answers in which neither yes nor no occurs, nor another word for no."""
    texts = [answer_of(row) or "" for row in rows]
    return sum(not (_YES.search(text) or _NO.search(text)) for text in texts) / len(texts)

"""What a benchmark's card names to score by: metrics and parsers, and how to write one's own.

A parser takes the answer out of a model's words, a metric compares it with the references. The simple way is a function, the
whole way a class:

    # my_scores.py
    from mmkd.evaluation.metric import Metric
    from mmkd.registry import register

    @register("parsers", "last_word")
    def last_word(text):                                    # or (text, choices)
        \"\"\"The last word of the answer.\"\"\"
        return text.split()[-1].strip(".") if text.split() else None   # None: the words hold no answer

    @register("metrics", "starts_alike")
    def starts_alike(prediction, references):
        \"\"\"1.0 when the answer begins with a reference.\"\"\"
        return float(any(prediction.startswith(reference) for reference in references))

    @register("metrics", "by_level")
    class ByLevel(Metric):
        \"\"\"Spaces do not matter in hard questions.\"\"\"

        def score(self, answer, question):
            hard = question.categories.get("level") == "hard"
            plain = answer.replace(" ", "") if hard else answer
            return float(plain in question.references)

        def aggregate(self, rows):
            return {"hard": sum(row["score"] for row in rows if row["categories"].get("level") == "hard")}

A card that names them says `imports: [my_scores]`, or `mmkd evaluate --imports my_scores` is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmkd.data.samples import Question
from mmkd.errors import DataError, did_you_mean
from mmkd.evaluation.hallucination import hallucinated
from mmkd.registry import Registry, registry

TASKS = "mmkd.evaluation.tasks"

Rows = Sequence[Mapping[str, Any]]


class Metric:
    """How an answer is scored. Subclasses are registered (`@register("metrics", NAME)`) and made without arguments."""

    def score(self, answer: str, question: Question) -> float:
        """0.0 to 1.0 for a parsed answer. `question.references` are what it is compared with: at least one; for a question
        that is answered by letter the right choice's letter."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `score`")

    has_lenient = False  # whether `score_lenient` scores answers too, beside the headline

    def score_lenient(self, answer: str, question: Question) -> float:
        """As a reader would score an answer."""
        return self.score(answer, question)

    def hallucinated(self, answer: str | None, question: Question) -> float | None:
        """1.0 for an answer that names what is not in the picture, 0.0 for another; None where the question cannot tell."""
        return hallucinated(answer, question)

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Further keys of results.json, from the scored rows of predictions.jsonl."""
        return {}


class Parser:
    """How the answer is found in a model's words. Subclasses are registered (`@register("parsers", NAME)`)."""

    has_lenient = False  # whether `lenient` reads answers too, whose score stands beside the headline

    def parse(self, text: str, choices: Sequence[str]) -> str | None:
        """The answer, or None where the words hold none, which scores 0."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `parse`")

    def lenient(self, text: str, choices: Sequence[str]) -> str | None:
        """The answer as a human reader would take it."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `lenient`")

    def aggregate(self, rows: Rows) -> dict[str, Any]:
        """Further keys of results.json, as in `Metric.aggregate`."""
        return {}


class _FunctionMetric(Metric):
    def __init__(self, function: Callable[[str, Sequence[str]], float]):
        self._function = function

    def score(self, answer: str, question: Question) -> float:
        return self._function(answer, question.references)


class _FunctionParser(Parser):
    def __init__(self, function: Callable[..., str | None]):
        self._function = function
        self._asks_choices = len(inspect.signature(function).parameters) > 1

    def parse(self, text: str, choices: Sequence[str]) -> str | None:
        return self._function(text, choices) if self._asks_choices else self._function(text)


def metric_of(name: str) -> Metric:
    """The metric of a name. Raises DataError, with a suggestion."""
    found = _registered("metrics", name)
    return found() if isinstance(found, type) else _FunctionMetric(found)


def parser_of(name: str) -> Parser:
    """The parser of a name. Raises DataError, with a suggestion."""
    found = _registered("parsers", name)
    return found() if isinstance(found, type) else _FunctionParser(found)


def _registered(kind: str, name: str) -> Any:
    known = registry(kind)
    if name not in known:
        raise DataError(f"there is no {kind[:-1]} {name!r}; {did_you_mean(name, known)}")
    return known.get(name)


# ---- numbers that go with a format: whatever metric and parser score it ---------------------------------------------

_FORMATS = Registry("numbers", TASKS)


def aggregate_of_format(name: str) -> Callable[[Callable[[Rows], dict]], Callable[[Rows], dict]]:
    """A decorator for what `Metric.aggregate` would give, for all benchmarks whose questions are of a format."""

    def keep(function: Callable[[Rows], dict]) -> Callable[[Rows], dict]:
        _FORMATS.add(name, function)
        return function

    return keep


def further_numbers(format: str, parser: Parser, metric: Metric, rows: Rows) -> dict[str, Any]:
    """What parser, metric and format add to results.json."""
    of_format = _FORMATS.get(format)(rows) if format in _FORMATS else {}
    return parser.aggregate(rows) | metric.aggregate(rows) | of_format

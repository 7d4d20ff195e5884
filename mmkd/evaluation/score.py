"""From answers to scored rows (predictions.jsonl) and to the numbers of results.json."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmkd.errors import DataError
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.evaluation.calibration import calibration
from mmkd.evaluation.hallucination import NAME as HALLUCINATED
from mmkd.evaluation.intervals import interval
from mmkd.evaluation.items import Item
from mmkd.evaluation.metric import further_numbers, metric_of, parser_of
from mmkd.evaluation.remarks import remarks
from mmkd.evaluation.results import group_of
from mmkd.towers.thinking import CLOSED, UNCLOSED, without_thinking

log = logging.getLogger(__name__)


class Scorer:
    """A benchmark's parser and metrics, put to its questions one by one and then to all rows."""

    def __init__(self, benchmark: Benchmark, opens_thinking: bool = False, by_likelihood: bool = False):
        """`opens_thinking`: prompts end within a thinking block. `by_likelihood`: letters were chosen, not generated."""
        self.benchmark = benchmark
        self._opens, self._by_likelihood = opens_thinking, by_likelihood
        self.parser, self.metric = parser_of(benchmark.parser), metric_of(benchmark.metric)
        self._has_lenient = self.parser.has_lenient or self.metric.has_lenient
        self.also = {name: metric_of(name) for name in benchmark.also}

    # ---- one question ------------------------------------------------------------------------------------------------

    def row(self, item: Item, answer: Mapping[str, Any] | None) -> dict[str, Any]:
        """The row of predictions.jsonl for a question and what was answered: {"prediction", "skipped"}."""
        question = item.question
        row = {
            "id": question.id,
            "question": question.question,
            "choices": list(question.choices),
            "prompt": item.prompt,
            "prediction": None,
            "parsed": None,
            "score": None,
            "references": list(item.references),
            "categories": {"modality": "image" if question.images else "text", **question.categories},
            "images": [ref.key for ref in question.images],
            "group": item.group,
            "skipped": item.skipped or (answer or {}).get("skipped"),
        }
        if row["skipped"]:
            return row
        row |= self._scored(item, answer["prediction"])
        if "likelihood" in answer and not row.get("thinking"):  # within a thinking block the first words are not the answer's
            row["likelihood"] = answer["likelihood"]
        return row

    def _scored(self, item: Item, text: str) -> dict[str, Any]:
        question = item.question
        asked = replace(question, references=item.references)
        generated = not (self._by_likelihood and self.benchmark.by_letter(question))
        answer, thinking = without_thinking(text, self._opens and generated)
        parsed = None if answer is None else self.parser.parse(answer, question.choices)
        found: dict[str, Any] = {"prediction": text, "parsed": parsed, "score": None}
        if thinking:
            found |= {"thinking": thinking, "answer": answer}
        if not item.references:  # nothing to compare with, as in splits that a test server scores
            return found

        def score(metric: Any, answer: str | None) -> float:
            return 0.0 if answer is None else metric.score(answer, asked)

        found["score"] = score(self.metric, parsed)
        also = {name: score(metric, parsed) for name, metric in self.also.items()}
        if (made_up := self.metric.hallucinated(parsed, question)) is not None:
            also[HALLUCINATED] = made_up
        if also:
            found["also"] = also
        if self._has_lenient:
            lenient = self.parser.lenient(answer, question.choices) if self.parser.has_lenient and answer is not None else parsed
            beside = 0.0 if lenient is None else self.metric.score_lenient(lenient, asked)
            found |= {"score_strict": found["score"], "parsed_lenient": lenient, "score_lenient": beside}
        return found

    # ---- all questions -----------------------------------------------------------------------------------------------

    def results(self, items: Sequence[Item], rows: Sequence[dict], header: dict[str, Any], limit: int | None) -> dict[str, Any]:
        """What results.json says of the answers. Raises DataError where nothing could be answered."""
        benchmark = self.benchmark
        scored = [row for row in rows if not row["skipped"]]
        results = header | {
            "title": benchmark.title,
            "metric": benchmark.metric,
            **_headline(scored, self._skipped(rows)),
            "remarks": self._remarks(scored),
            "unparsed_share": sum(row["parsed"] is None for row in scored) / len(scored),
            "thinking_share": sum(row.get("thinking") == CLOSED for row in scored) / len(scored),
            "unclosed_thinking_share": self._unclosed(scored) / len(scored),
            "rows": len(rows),
            "expected_rows": benchmark.expected_rows,
            "rows_difference": _rows_difference(benchmark, len(rows), limit),
            "split": benchmark.split,
            "limit": limit,
            "prompt": items[0].prompt,
            "prompt_style": benchmark.prompt_style,
            "parser": benchmark.parser,
            "ocr_tokens": benchmark.ocr,
            "generation": {"do_sample": False, "num_beams": 1, "max_new_tokens": benchmark.max_new_tokens},
            "reference_scores": [score.model_dump() for score in benchmark.reference_scores],
            "by": {},
        }
        if results["score"] is None:
            return results
        results["by"] = {category: _by(scored, category) for category in benchmark.categories}
        also = {name: _score_of(scored, "also", name) for name in self.also}
        if checkable := [row for row in scored if HALLUCINATED in row.get("also", {})]:
            also[HALLUCINATED] = _score_of(checkable, "also", HALLUCINATED)
        if also:
            results["also"] = also
        if self._has_lenient:
            lenient = _score_of(scored, "score_lenient")
            results |= {"score_lenient": lenient["score"], "ci95_lenient": lenient["ci95"]}
        if found := calibration(scored):
            results["calibration"] = found
        return results | further_numbers(benchmark.format, self.parser, self.metric, scored)

    def _remarks(self, scored: Sequence[dict]) -> list[str]:
        """What is wrong with the answers as a whole."""
        found = remarks(scored)
        if found:
            log.warning("%s: %s", self.benchmark.name, "; ".join(found))
        return found

    def _unclosed(self, scored: Sequence[dict]) -> int:
        """How many answers end within their thinking."""
        count = sum(row.get("thinking") == UNCLOSED for row in scored)
        if count:
            log.warning(
                "%s: %d of %d answers end within their thinking and count as unparsed; max_new_tokens is %d, give thinking "
                "more in a card of your own", self.benchmark.name, count, len(scored), self.benchmark.max_new_tokens,
            )  # fmt: skip
        return count

    def _skipped(self, rows: Sequence[dict]) -> dict[str, int]:
        """How many questions were skipped, by reason."""
        reasons = Counter(_short_reason(row) for row in rows if row["skipped"])
        name = self.benchmark.name
        if sum(reasons.values()) == len(rows):
            raise DataError(f"benchmark {name!r}: no question could be answered: {dict(reasons)}")
        if reasons:
            log.warning("%s: %d questions skipped: %s", name, sum(reasons.values()), dict(reasons))
        return dict(reasons)


def _headline(scored: Sequence[dict], skipped: dict[str, int]) -> dict[str, Any]:
    """Score and interval; None in a split whose answers a test server keeps."""
    score = {"n": len(scored), "score": None, "ci95": None} if scored[0]["score"] is None else _score_of(scored, "score")
    return score | {"n_skipped": sum(skipped.values()), "skipped": skipped}


def _score_of(rows: Sequence[dict], key: str, metric: str | None = None) -> dict[str, Any]:
    values = [row[key] if metric is None else row[key][metric] for row in rows]
    mean, low, high = interval(values, [group_of(row) for row in rows])
    return {"n": len(rows), "score": mean, "ci95": [low, high]}


def _by(rows: Sequence[dict], category: str) -> dict[str, dict]:
    values: dict[str, list[dict]] = {}
    for row in rows:
        values.setdefault(row["categories"].get(category, "(none)"), []).append(row)
    return {value: _score_of(values[value], "score") for value in sorted(values)}


def _rows_difference(benchmark: Benchmark, rows: int, limit: int | None) -> str | None:
    if benchmark.expected_rows is None or rows == benchmark.expected_rows:
        return None
    cause = f"limit={limit}" if limit is not None else "another release or a part of the data"
    expected = benchmark.expected_rows
    return f"{rows} rows, the card expects {expected} ({cause}): not comparable with published numbers"


def _short_reason(row: dict) -> str:
    """The reason without the question's id, the picture's path and numbers, so that equal reasons are counted together."""
    reason = row["skipped"].replace(f" {row['id']!r}", "")
    for key in row["images"]:
        reason = reason.replace(f" {key}", "")
    return reason.partition(":")[0] if reason.startswith("image ") else re.sub(r"\d[\d,.]*\d|\d", "N", reason)[:160]

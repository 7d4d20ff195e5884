"""Answers about things that are not in the picture: hallucination, in the sense of what can be checked without a judge.

Three kinds of questions allow it:

- open questions on pictures of which all things are known (`Question.shown`; the embedded sample's captions say everything that
  its scenes show). Asked for a colour, a shape or a text, an answer is made up when it names one that occurs nowhere in the
  picture. Naming another thing that is there (the letters' colour for the sign's) is wrong, but not made up; an empty answer
  claims nothing. Questions for a count are left out: a count names no thing.
- questions whether something is there (POPE), where the truth is "no": "yes" is made up.
- the same where each answer says what it claims (`Question.claims`; easy-VQA, which also asks "is there not a circle?"): an
  answer is made up when it claims what is not in the picture. Questions of which no answer would are left out.

So a model that never names what it does not see has 0, right or wrong; it is a rate of errors, lower is better. The ground behind
the things is none of them. Compare two runs on the same questions:

    python -m mmkd.evaluation.hallucination runs/before/evaluation/student/sample_textvqa runs/after/...
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.samples import Question
from mmkd.data.scenes import singular_of, things
from mmkd.errors import DataError
from mmkd.evaluation.intervals import interval, paired_difference
from mmkd.evaluation.normalise import normalise_evalai
from mmkd.evaluation.results import group_of, read_predictions, same_questions

NAME = "hallucinated"  # in a row's and a result's `also`
PREDICTIONS = "predictions.jsonl"
NO_THING = "count"  # category of questions whose answer names none
_YES_NO = (("yes",), ("no",))  # references of questions whose answer names none either


def hallucinated(answer: str | None, question: Question) -> float | None:
    """1.0 for an answer that names what is not in the picture, else 0.0; None for a question that cannot tell.

    answer: as parsed, None where nothing could be. A metric may know better (see `Metric.hallucinated`).
    """
    if question.claims:
        false = {said for said, thing in question.claims.items() if thing not in question.shown}
        return float(normalise_evalai(answer or "") in false) if false else None
    if not question.shown or question.categories.get("category") == NO_THING or question.references in _YES_NO:
        return None
    words = normalise_evalai(answer or "").split()
    # A single word is what the answer names, also where it is no word at all, such as a sign misread.
    named = [singular_of(words[0])] if len(words) == 1 else things(" ".join(words))
    return float(any(name not in question.shown for name in named))


# ---- two runs --------------------------------------------------------------------------------------------------------


def compare(before: Path | str, after: Path | str) -> dict[str, Any]:
    """Rates of two evaluations of the same questions and the paired difference, each with its 95 % interval.

    Raises DataError for runs of other questions, and where no row can tell.
    """
    runs = {"before": read_predictions(Path(before) / PREDICTIONS), "after": read_predictions(Path(after) / PREDICTIONS)}
    ids = [i for i in same_questions(runs) if all(NAME in (run[i].get("also") or {}) for run in runs.values())]
    if not ids:
        raise DataError(f"no answer of {before} and {after} can be told made up; evaluate a benchmark that can tell again")
    groups = [group_of(runs["before"][i]) for i in ids]
    rates = {name: [run[i]["also"][NAME] for i in ids] for name, run in runs.items()}
    found = {name: _measured(interval(values, groups)) for name, values in rates.items()}
    return {"n": len(ids), **found, "difference": _measured(paired_difference(rates["after"], rates["before"], groups))}


def _measured(values: Sequence[float]) -> dict[str, Any]:
    return {"score": values[0], "ci95": list(values[1:])}


def _line(name: str, found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{name:<11} {100 * found['score']:6.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def main(arguments: Sequence[str]) -> int:
    """BEFORE AFTER: folders with predictions.jsonl."""
    if len(arguments) != 2:
        print("usage: python -m mmkd.evaluation.hallucination BEFORE AFTER (folders of evaluations)", file=sys.stderr)
        return 2
    try:
        found = compare(*arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"answers about things that are not in the picture, {found['n']} questions")
    for name in ("before", "after", "difference"):
        print(_line(name, found[name]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

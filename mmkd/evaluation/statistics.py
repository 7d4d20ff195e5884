"""Whether one model is better than another: models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import DataError
from mmkd.evaluation.calibration import nll_difference, probabilities
from mmkd.evaluation.intervals import interval, paired_difference
from mmkd.evaluation.remarks import remarks
from mmkd.evaluation.results import group_of, read_predictions, same_questions
from mmkd.evaluation.roles import HARD_ANSWERS, STUDENT, TEACHER, best_control, in_words, is_control, learnt_answers


def agreement(a_predictions: Sequence[str | None], b_predictions: Sequence[str | None]) -> float:
    """Share of questions with the same answer, right or wrong, but for case and white space around it."""
    if len(a_predictions) != len(b_predictions) or not len(a_predictions):
        raise DataError(
            f"agreement needs the same questions, at least one: {len(a_predictions)} against "
            f"{len(b_predictions)}"
        )
    plain = [[(text or "").strip().casefold() for text in side] for side in (a_predictions, b_predictions)]
    return sum(x == y for x, y in zip(*plain, strict=True)) / len(a_predictions)


# ---- models on the same questions -----------------------------------------------------------------------------------


def compare_runs(predictions: Mapping[str, Path | str]) -> dict:
    """Models on the same questions: {model name: path of its predictions.jsonl} -> one comparison.

    Questions that any model skipped are left out for all, and counted.  Returns
        n, n_skipped                       questions compared and left out
        models      {name: {"score", "ci95"}}, and "remarks" where answers are degenerate (see `mmkd.evaluation.remarks`)
        differences {"a - b": {"difference", "ci95", "agreement", "only_first", "only_second"}}   students first, controls
                                           and teachers last; the last two count questions that one has fully right and the
                                           other has not; "nll" where probabilities are known (see
                                           `mmkd.evaluation.calibration.nll_difference`)
        fidelity    {name: agreement}      with the teacher, where there is one
        beats_teacher {name: ids}          that a model has fully right and the teacher has not, where there is one
        student_beats_teacher              the student's, if both are there
        best_control                       the control with the highest score, None where there is none
        verdict                            in words: is the student better than its best control?
        over_hard_answers                  in words: and than the same student on the teacher's answers? None without one
    Scores are 0..1.  Raises DataError when ids differ or nothing is left.
    """
    if not predictions:
        raise DataError("there is nothing to compare; give at least one model's predictions")
    runs = {name: read_predictions(path) for name, path in predictions.items()}
    ids = same_questions(runs)
    kept = _answered_by_all(runs, ids)
    groups = [group_of(next(iter(runs.values()))[i]) for i in kept]
    scores = {name: [run[i].get("score") for i in kept] for name, run in runs.items()}
    unscored = [name for name, values in scores.items() if None in values]
    if unscored:
        raise DataError(f"{', '.join(unscored)}: questions without a score cannot be compared; use a split with answers")
    answers = {name: [run[i].get("prediction") for i in kept] for name, run in runs.items()}
    models = {}
    for name, values in scores.items():
        mean, low, high = interval(values, groups)
        models[name] = {"score": mean, "ci95": [low, high]}
        if said := remarks([runs[name][i] for i in kept]):
            models[name]["remarks"] = said
    known = {name: probabilities([run[i] for i in kept]) for name, run in runs.items()}
    best = best_control({name: cell["score"] for name, cell in models.items()})
    differences = {}
    for a, b in _pairs(list(runs)):
        mean, low, high = paired_difference(scores[a], scores[b], groups)
        differences[f"{a} - {b}"] = {
            "difference": mean,
            "ci95": [low, high],
            "agreement": agreement(answers[a], answers[b]),
            "only_first": len(_won(scores[a], scores[b], kept)),
            "only_second": len(_won(scores[b], scores[a], kept)),
        }
        if found := nll_difference(known[a], known[b]):
            differences[f"{a} - {b}"]["nll"] = found
    return {
        "n": len(kept),
        "n_skipped": len(ids) - len(kept),
        "models": models,
        "differences": differences,
        **_with_teacher(scores, differences, kept),
        "best_control": best,
        "verdict": verdict(differences.get(f"student - {best}"), best or "control"),
        "over_hard_answers": _over_hard_answers(differences),
    }


def _answered_by_all(runs: Mapping[str, Mapping[str, dict]], ids: Sequence[str]) -> list[str]:
    """The ids that no model skipped. Raises DataError where there are none."""
    kept = [i for i in ids if not any(run[i].get("skipped") for run in runs.values())]
    if not kept:
        raise DataError(f"none of {len(ids)} questions was answered by all of {', '.join(runs)}")
    return kept


def _with_teacher(scores: Mapping[str, Sequence[float]], differences: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """How the models stand to the one that is called teacher: "fidelity", "beats_teacher", "student_beats_teacher"."""
    others = [name for name in scores if name != "teacher"] if "teacher" in scores else []
    beats = {name: _won(scores[name], scores["teacher"], ids) for name in others}
    found = {"fidelity": {name: differences[f"{name} - teacher"]["agreement"] for name in others}, "beats_teacher": beats}
    return found | ({"student_beats_teacher": beats["student"]} if "student" in beats else {})


RIGHT = 0.995  # a score from here on is fully right; soft accuracies are sums of thirds


def _won(first: Sequence[float], second: Sequence[float], ids: Sequence[str]) -> list[str]:
    """The ids that the first has fully right and the second has not."""
    return [i for i, a, b in zip(ids, first, second, strict=True) if a >= RIGHT > b]


def modality_importance(seen: Mapping[str, Mapping], blind: Mapping[str, Mapping]) -> dict[str, Any]:
    """Which questions need their picture: rows of an evaluation and of the same with the pictures taken away.

    Among the questions with a picture that both answered: "both" (right without it, too), "needs_image" (right only with
    it), "hurt_by_image" (right only without), "neither", each a share; "blind_score" is the mean score without pictures,
    "gain" the mean difference, "ids" those that need the picture. Only {"n": 0} where none has a picture.
    Raises DataError when the two hold other questions.
    """
    ids = same_questions({"with pictures": seen, "without": blind})
    kept = [
        i for i in ids
        if seen[i].get("images") and seen[i].get("score") is not None and blind[i].get("score") is not None
    ]  # fmt: skip
    if not kept:
        return {"n": 0}
    a, b = [seen[i]["score"] for i in kept], [blind[i]["score"] for i in kept]
    needs, hurt = _won(a, b, kept), _won(b, a, kept)
    both = sum(x >= RIGHT and y >= RIGHT for x, y in zip(a, b, strict=True))
    count = len(kept)
    shares = {"both": both, "needs_image": len(needs), "hurt_by_image": len(hurt)}
    shares["neither"] = count - sum(shares.values())
    means = {"blind_score": math.fsum(b) / count, "gain": (math.fsum(a) - math.fsum(b)) / count}
    return {"n": count, **{name: value / count for name, value in shares.items()}, **means, "ids": needs}


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Every pair once, minuend first: students, then other models, what they are held against, the teacher.

    So a difference has the same sign wherever it is shown; models of one kind keep the order given.
    """
    names = sorted(names, key=_place)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def _place(name: str) -> int:
    """Where a model stands in differences, by its role, which is the last word of its name where several runs are compared."""
    role = name.rpartition(" ")[2]
    if role in (STUDENT, TEACHER):
        return 0 if role == STUDENT else 4
    return 2 if learnt_answers(role) else 3 if is_control(role) else 1


def _over_hard_answers(differences: Mapping[str, Any]) -> str | None:
    found = differences.get(f"student - {HARD_ANSWERS}")
    if found is None:
        return None
    low, high = (100 * bound for bound in found["ci95"])
    shown = "more" if low > 0 else "less" if high < 0 else "no difference shown"
    text = f"over the teacher's hard answers: {100 * found['difference']:+.1f} points [{low:+.1f}, {high:+.1f}], {shown}"
    return f"{text}; {nll_in_words(found['nll'])}" if "nll" in found else text


def nll_in_words(found: Mapping[str, Any]) -> str:
    """A paired difference of negative log-likelihoods, as `nll_difference` gives it, and whether it is one."""

    def told(difference: Mapping[str, Any]) -> str:
        low, high = difference["ci95"]
        shown = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        return f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {shown}"

    return f"NLL {told(found)} (each at its best temperature {told(found['after_temperature'])})"


def verdict(difference: Mapping | None, control: str = "control") -> str:
    """The paired difference of student and control in words; `difference` as in `compare_runs`, or None."""
    if difference is None:
        return "no control was evaluated: the effect of the teacher is not known"
    low, high = (100 * bound for bound in difference["ci95"])
    points = 100 * difference["difference"]
    span, other = f"[{low:+.1f}, {high:+.1f}]", in_words(control)
    if low > 0:
        return f"student leads its {other}: {points:+.1f} points {span}"
    if high < 0:
        return f"student is behind its {other}: {points:+.1f} points {span}"
    return f"student and {other} show no difference: {points:+.1f} points {span}"

"""How far a model's probabilities can be trusted: log-likelihood, calibration error, and what it is surest of.

A question answered by letter has the probabilities of its choices; its confidence is that of the likeliest one, which is right or
not. A short answer has the probability of the words that were said, which is its confidence, and that of the reference's words.
Both have a negative log-likelihood (NLL): of the right choice among the choices, of the reference.

All is also told after the temperature that fits best, by which sharp and flat models become comparable. It is fitted by
cross-fitting: on the other pictures, never on the questions that it is put to.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkd.data.prompts import letter_of
from mmkd.evaluation.intervals import mean_interval, t_quantile
from mmkd.evaluation.results import group_of
from mmkd.towers.likelihood import TEMPERATURES

SHORT = 32  # tokens; benchmarks that allow longer answers get no likelihoods of references
BINS = 15  # of the calibration error, of equal width
FOLDS = 5  # of the pictures, by which the temperature is fitted
BLOCKS = 40  # of the pictures, of which the jackknife leaves out one at a time
CURVE = 20  # points of the risk-coverage curve
_ONE = min(range(len(TEMPERATURES)), key=lambda place: abs(TEMPERATURES[place] - 1))


def most_common(references: Sequence[str]) -> str | None:
    """The reference that is given most often, of several the first."""
    return Counter(references).most_common(1)[0][0] if references else None


@dataclass(frozen=True)
class Probabilities:
    """Of n questions at all temperatures: what they say of the right answer, and how sure the model is."""

    ids: list[str]
    nll: np.ndarray  # [n, T]
    confidence: np.ndarray  # [n, T]
    right: np.ndarray  # [n], 0..1: of the likeliest choice, or the answer's score
    groups: list[str]  # [n], the picture of each
    choices: int  # how many of them are answered by letter

    @property
    def folds(self) -> np.ndarray:
        """A part of the pictures for each question, the same for all models. [n]"""
        return np.array([zlib.crc32(group.encode("utf-8", "backslashreplace")) for group in self.groups]) % FOLDS

    def fitted(self) -> np.ndarray:
        """For each question the temperature's place that fits best on the pictures of other parts. [n]"""
        folds = self.folds
        best = {fold: int(self.nll[folds != fold].mean(0).argmin()) if (folds != fold).any() else _ONE for fold in set(folds)}
        return np.array([best[fold] for fold in folds])

    def nll_of(self, fitted: bool) -> np.ndarray:
        """Negative log-likelihoods as they are, or after the fitted temperature. [n]"""
        return self.nll[np.arange(len(self.ids)), self.fitted() if fitted else _ONE]

    def confidence_of(self, fitted: bool) -> np.ndarray:
        return self.confidence[np.arange(len(self.ids)), self.fitted() if fitted else _ONE]


def probabilities(rows: Sequence[Mapping[str, Any]]) -> Probabilities | None:
    """Of the rows of predictions.jsonl that have likelihoods; None where there are none."""
    known = [(row, found) for row in rows if (found := _of_row(row)) is not None]
    if not known:
        return None
    nll, confidence, right = (np.stack([found[place] for _, found in known]) for place in range(3))
    by_letter = sum("choices" in row["likelihood"] for row, _ in known)
    return Probabilities([row["id"] for row, _ in known], nll, confidence, right, [group_of(row) for row, _ in known], by_letter)


def _of_row(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(NLL [T], confidence [T], whether right) of one row; None where something of it is not known."""
    kept, references = row.get("likelihood") or {}, row.get("references") or []
    if row.get("score") is None or not references:
        return None
    if (logits := kept.get("choices")) is not None:
        letters = [letter_of(place) for place in range(len(logits))]
        if references[0] not in letters or len(logits) < 2:
            return None
        right = letters.index(references[0])
        scaled = np.array(logits)[None] / np.array(TEMPERATURES)[:, None]  # [T, k]
        scaled -= scaled.max(1, keepdims=True)
        shares = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        return np.log(np.exp(scaled).sum(1)) - scaled[:, right], shares.max(1), float(int(np.argmax(logits)) == right)
    own, reference = kept.get("own"), kept.get("reference")
    if own is None or reference is None or not len(own) == len(reference) == len(TEMPERATURES):
        return None
    return -np.array(reference), np.exp(np.array(own)), float(row["score"])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def calibration(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What results.json says of the probabilities; None where they are not known.

    n, choices              questions, and how many of them are answered by letter
    score                   share that is right: the likeliest letter, or the answer's score
    nll                     mean negative log-likelihood of the right answer, in nats
    ece                     expected calibration error: |confidence - score| in bins of equal width, weighted by their questions
                            (Naeini et al. 2015; Guo et al. 2017, "On calibration of modern neural networks")
    most_confident_third    score among the third of the questions that the model is surest of
    aurc                    area under the risk-coverage curve: the share that is wrong, averaged over how many of the surest
                            questions are answered (Geifman and El-Yaniv 2017, "Selective classification for deep networks")
    after_temperature       "temperature" (fitted on all), "nll" and "ece" after one that was fitted on other pictures
    curve                   [[share answered, score among these], ...], the surest first

    Each number is {"value", "ci95"}; intervals are over pictures: that of the mean for NLL, by a jackknife over blocks of
    pictures for the others. An error that is near 0 comes out larger, as it is a sum of absolute values.
    """
    found = probabilities(rows)
    if found is None:
        return None
    blocks = _blocks(found.groups)

    def told(statistic: Callable[[np.ndarray, np.ndarray], float], fitted: bool = False) -> dict[str, Any]:
        return _jackknife(statistic, found.confidence_of(fitted), found.right, blocks)

    return {
        "n": len(found.ids),
        "choices": found.choices,
        "score": float(found.right.mean()),
        "nll": _mean(found.nll_of(fitted=False), found.groups),
        "ece": told(calibration_error),
        "most_confident_third": told(score_of_surest),
        "aurc": told(area_under_risk),
        "after_temperature": {
            "temperature": round(TEMPERATURES[int(found.nll.mean(0).argmin())], 4),
            "nll": _mean(found.nll_of(fitted=True), found.groups),
            "ece": told(calibration_error, fitted=True),
        },
        "curve": _curve(found.confidence_of(fitted=False), found.right),
    }


def nll_difference(a: Probabilities | None, b: Probabilities | None) -> dict[str, Any] | None:
    """The paired difference of two models' NLL on the questions of which both have it, below 0 where the first is better.

    {"n", "difference", "ci95", "after_temperature": {"difference", "ci95"}}, each model at its own fitted temperature; None
    without such questions.
    """
    if a is None or b is None:
        return None
    places = [{name: place for place, name in enumerate(side.ids)} for side in (a, b)]
    at = [[place[name] for name in a.ids if name in places[1]] for place in places]
    if not at[0]:
        return None
    found: dict[str, Any] = {"n": len(at[0])}
    groups = [a.groups[place] for place in at[0]]
    for fitted in (False, True):
        mean, low, high = mean_interval(a.nll_of(fitted)[at[0]] - b.nll_of(fitted)[at[1]], groups)
        difference = {"difference": mean, "ci95": [low, high]}
        found |= {"after_temperature": difference} if fitted else difference
    return found


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over `BINS` bins of equal width. Both [n]."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def score_of_surest(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean score among the third with the highest confidence; equal confidences share their mean. Both [n]."""
    ordered = _by_confidence(confidence, right)
    return float(ordered[: math.ceil(len(ordered) / 3)].mean())


def area_under_risk(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean over k of the share that is wrong among the k surest. Both [n]."""
    ordered = _by_confidence(confidence, right)
    return float(1 - (np.cumsum(ordered) / np.arange(1, len(ordered) + 1)).mean())


def _by_confidence(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Scores, the surest first; those of equal confidence stand as their mean. [n]"""
    _, ranks, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    means = np.bincount(ranks, weights=right) / counts
    return means[np.sort(ranks)]


def _curve(confidence: np.ndarray, right: np.ndarray) -> list[list[float]]:
    ordered = _by_confidence(confidence, right)
    counts = sorted({max(1, round(len(ordered) * point / CURVE)) for point in range(1, CURVE + 1)})
    return [[round(k / len(ordered), 4), round(float(ordered[:k].mean()), 4)] for k in counts]


def _mean(values: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    mean, low, high = mean_interval(values, groups)
    return {"value": mean, "ci95": [max(0.0, low), high]}


def _blocks(groups: Sequence[str]) -> np.ndarray:
    """Pictures put together into at most `BLOCKS` parts of about equal size, the same for all models. [n]"""
    names = sorted(set(groups), key=lambda group: (zlib.crc32(group.encode("utf-8", "backslashreplace")), group))
    place = {group: number % BLOCKS for number, group in enumerate(names)}
    return np.array([place[group] for group in groups])


def _jackknife(
    statistic: Callable[[np.ndarray, np.ndarray], float], confidence: np.ndarray, right: np.ndarray, blocks: np.ndarray
) -> dict[str, Any]:
    """A statistic in 0..1 with its 95 % interval, from what it is without each block of pictures; [0, 1] for one block."""
    whole, count = statistic(confidence, right), int(blocks.max()) + 1
    if count < 2:
        return {"value": whole, "ci95": [0.0, 1.0]}
    without = np.array([statistic(confidence[blocks != block], right[blocks != block]) for block in range(count)])
    half = t_quantile(count - 1) * math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    return {"value": whole, "ci95": [max(0.0, whole - half), min(1.0, whole + half)]}

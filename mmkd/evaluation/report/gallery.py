"""Questions to look at, with their pictures and every model's answer."""

from __future__ import annotations

import base64
import io
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.samples import TABLES, ImageRef
from mmkd.errors import ImageError
from mmkd.evaluation.results import same_questions
from mmkd.evaluation.statistics import RIGHT

GALLERY_SIZE = 36
GALLERY_SEED = 0
THUMBNAIL = 288  # pixels, the longer side
SMALL = 160  # up to here PNG, which keeps drawn pictures sharp
MAX_ANSWER = 500  # characters shown of one prediction

log = logging.getLogger(__name__)


def gallery_of(benchmarks: Sequence[Mapping], slugs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Questions to look at, about GALLERY_SIZE: of each benchmark half at random, half where models differ."""
    share = max(4, GALLERY_SIZE // len(benchmarks))
    return [item for benchmark in benchmarks for item in _gallery_of(benchmark, share, slugs)][
        : max(GALLERY_SIZE, 48)
    ]


def _gallery_of(benchmark: Mapping, share: int, slugs: Mapping[str, str]) -> list[dict[str, Any]]:
    runs = benchmark["rows"]
    ids = [i for i in same_questions(runs) if not any(run[i].get("skipped") for run in runs.values())]
    drawn = random.Random(GALLERY_SEED).sample(ids, len(ids))
    best = benchmark["best_control"]
    parting = sorted(drawn, key=lambda i: -_spread(runs, i, best))
    parting = [i for i in parting if _spread(runs, i, best) > 0][: share // 2]
    plain = [i for i in drawn if i not in set(parting)][: share - len(parting)]
    order = {i: place for place, i in enumerate(ids)}
    rows = next(iter(runs.values()))
    return [
        _gallery_item(benchmark, i, i in parting, slugs)
        for i in sorted(parting + plain, key=lambda i: (not rows[i].get("images"), order[i]))
    ]


def _spread(runs: Mapping[str, Mapping[str, dict]], question: str, best_control: str | None) -> float:
    """How far student and best control (else all models) lie apart on a question."""
    pair = [runs[role] for role in ("student", best_control) if role in runs]
    scores = [run[question]["score"] for run in (pair if len(pair) == 2 else runs.values())]
    return max(scores) - min(scores)


def _gallery_item(benchmark: Mapping, question: str, parted: bool, slugs: Mapping[str, str]) -> dict[str, Any]:
    rows = {role: run[question] for role, run in benchmark["rows"].items()}
    row = next(iter(rows.values()))
    scores = {role: r["score"] for role, r in rows.items()}
    return {
        "id": question,
        "benchmark": benchmark["name"],
        "title": benchmark["title"],
        "question": row.get("question") or row["prompt"],
        "choices": row.get("choices") or [],
        "prompt": row["prompt"],
        "references": _reference_text(row),
        "answers": [
            {
                "role": role,
                "text": _shorten(r.get("prediction") or ""),
                "score": r["score"],
                "mark": _mark(r["score"]),
            }
            for role, r in rows.items()
        ],
        "pictures": [_thumbnail(key) for key in row.get("images") or ()],
        "chosen": "models differ" if parted else "drawn at random",
        "outcome": _outcome(scores, benchmark["best_control"]),
        "classes": " ".join(f"{slugs[role]}-{_mark(score)}" for role, score in scores.items()),
    }


def _shorten(text: str) -> str:
    return (
        text
        if len(text) <= MAX_ANSWER
        else text[:MAX_ANSWER] + f" … ({len(text) - MAX_ANSWER:,} more characters)"
    )


def _reference_text(row: Mapping) -> list[tuple[str, int]]:
    """The reference answers with how often each was given, commonest first; a letter with its choice."""
    counts: dict[str, int] = {}
    for text in row["references"]:
        counts[text] = counts.get(text, 0) + 1
    choices = row.get("choices") or []
    named = {chr(65 + i): f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices)}
    return sorted(
        ((named.get(text, text), count) for text, count in counts.items()), key=lambda pair: -pair[1]
    )


def _mark(score: float) -> str:
    return "right" if score >= RIGHT else "wrong" if score <= 0 else "partly"


OUTCOMES = {
    "gain": "student better than its best control",
    "loss": "best control better than student",
    "right": "all fully right",
    "wrong": "all wrong",
    "other": "anything else",
}


def _outcome(scores: Mapping[str, float], best_control: str | None) -> str:
    student, control = scores.get("student"), scores.get(best_control)
    if student is not None and control is not None and student != control:
        return "gain" if student > control else "loss"
    marks = {_mark(score) for score in scores.values()}
    return marks.pop() if marks in ({"right"}, {"wrong"}) else "other"


def outcomes(gallery: Sequence[Mapping]) -> list[tuple[str, str, int]]:
    counts = {key: sum(item["outcome"] == key for item in gallery) for key in OUTCOMES}
    return [(key, text, counts[key]) for key, text in OUTCOMES.items() if counts[key]]


MARKS = {"right": "right", "partly": "partly right", "wrong": "wrong"}


def marks(gallery: Sequence[Mapping], roles: Sequence[str]) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """For each model the marks that its answers got, with how many: [(role, [(mark, words, count), ...]), ...]."""
    found = []
    for role in roles:
        counts = Counter(answer["mark"] for item in gallery for answer in item["answers"] if answer["role"] == role)
        if len(counts) > 1:
            found.append((role, [(mark, words, counts[mark]) for mark, words in MARKS.items() if counts[mark]]))
    return found


def _thumbnail(key: str) -> dict[str, Any]:
    """A small picture as a data URI; `uri` is None where it cannot be read."""
    try:
        picture = _image_ref(key).load()
    except ImageError as error:
        log.warning("the report shows no picture for %s: %s", key, error)
        return {"name": Path(key).name, "uri": None}
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    kind, options = ("png", {}) if max(picture.size) <= SMALL else ("jpeg", {"quality": 82})
    stream = io.BytesIO()
    picture.save(stream, format=kind, **options)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return {
        "name": Path(key).name,
        "uri": f"data:image/{kind};base64,{data}",
        "width": picture.width,
        "height": picture.height,
    }


def _image_ref(key: str) -> ImageRef:
    """The reference that `ImageRef.key` was made from: a member of a zip archive, a cell of a table, or a file."""
    for suffix in (".zip", *TABLES):
        archive, found, member = key.partition(f"{suffix}/")
        if found and Path(archive + suffix).is_file():
            return ImageRef(Path(archive + suffix), member)
    return ImageRef(Path(key).parent, Path(key).name)

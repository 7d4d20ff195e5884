"""Preference pairs from answers: where one model (the teacher) is right and another (a student) wrong on a question of
the training split, the first one's answer is chosen and the other's rejected."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmkd.data.samples import DataError
from mmkd.evaluation.answer import PREDICTIONS, RESULTS
from mmkd.evaluation.compare import read_predictions, same_questions
from mmkd.files import write_whole

RIGHT, WRONG = 1.0, 0.0  # scores that count as such; what lies between (TextVQA's accuracy) is neither


def write_pairs(
    right: Path, wrong: Sequence[Path], output: Path, data_root: Path, *, split: str = "train"
) -> dict[str, dict[str, int]]:
    """Writes pairs as {id, prompt, images, chosen, rejected} lines, read by `format: preference`.

    right, wrong: folders that `mmkd evaluate --split` wrote, with the same benchmarks in each. A question gives one pair
    for each different wrong answer. data_root: the pictures' names are relative to it.

    Returns counts by benchmark. Raises DataError for answers to questions of another split than `split` (pairs of test
    questions would spoil the test), for models that answered different questions, for pictures outside `data_root`, and
    where no pair is found.
    """
    counts: dict[str, dict[str, int]] = {}
    lines: list[str] = []
    for name in _benchmarks(right, wrong):
        runs = {str(folder): _answers(folder / name, split) for folder in (right, *wrong)}
        found = Counter({"questions": 0, "right and wrong": 0, "pairs": 0})
        for identifier in same_questions(runs):
            rows = [rows[identifier] for rows in runs.values()]
            pairs = list(_pairs_of(rows[0], rows[1:], f"{name}/{identifier}", data_root))
            lines += [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
            found.update({"questions": 1, "right and wrong": bool(pairs), "pairs": len(pairs)})
        counts[name] = dict(found)
    if not lines:
        raise DataError(f"no question was answered rightly in {right} and wrongly in {', '.join(map(str, wrong))}: {counts}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, "".join(lines))
    return counts


def _benchmarks(right: Path, wrong: Sequence[Path]) -> list[str]:
    """Names of the benchmarks that every folder has answers to."""
    found = {folder: {path.parent.name for path in folder.glob(f"*/{PREDICTIONS}")} for folder in (right, *wrong)}
    names = sorted(set.intersection(*found.values()))
    if not names:
        shown = "; ".join(f"{folder}: {', '.join(sorted(there)) or 'none'}" for folder, there in found.items())
        raise DataError(f"there is no benchmark with answers in all folders ({shown}); run `mmkd evaluate --split train`")
    return names


def _answers(folder: Path, split: str) -> dict[str, dict]:
    try:
        there = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["split"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / RESULTS} does not say what was answered ({error!r}); evaluate again") from error
    if there != split:
        raise DataError(
            f"{folder} holds answers to split {there!r}, not {split!r}; pairs for training are made of training questions: "
            f"run `mmkd evaluate --split {split}`"
        )
    return read_predictions(folder / PREDICTIONS)


def _pairs_of(right: dict, others: Sequence[dict], name: str, data_root: Path) -> Iterator[dict]:
    if right["skipped"] or right["score"] < RIGHT:
        return
    chosen = right["prediction"].strip()
    # In the order of the models, each wrong answer once.
    rejected = dict.fromkeys(row["prediction"].strip() for row in others if not row["skipped"] and row["score"] <= WRONG)
    images = [_relative(key, data_root) for key in right["images"]]
    for number, answer in enumerate(answer for answer in rejected if answer and answer != chosen):
        identifier = name if number == 0 else f"{name}/{number}"
        yield {"id": identifier, "prompt": right["prompt"], "images": images, "chosen": chosen, "rejected": answer}


def _relative(key: str, data_root: Path) -> str:
    """A picture's name below the data's root."""
    try:
        name = Path(key).resolve().relative_to(data_root.resolve()).as_posix()
    except ValueError as error:
        raise DataError(f"picture {key} does not lie in {data_root}; give the folder that holds all pictures") from error
    if not (data_root / name).is_file():
        raise DataError(f"there is no picture {key}; pictures in archives must be unpacked to be named by pairs")
    return name

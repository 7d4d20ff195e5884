"""Preference pairs from answers: where one model (the teacher) is right and another (a student) wrong on a question of
the training split, the first one's answer is chosen and the other's rejected.

Such pairs are of the questions that the student gets wrong, whose answers are distributed otherwise: of a student that says no
too often, nearly all chosen answers are yes, and what it learns is to say yes. `every_question` keeps the questions as they are:
where nobody is wrong, what is rejected is an answer that a model gave to the same question on another picture.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mmkd.base.files import write_whole
from mmkd.errors import DataError
from mmkd.evaluation.answer import PREDICTIONS, RESULTS
from mmkd.evaluation.normalise import normalise_evalai
from mmkd.evaluation.results import answer_of, read_predictions, same_questions

RIGHT, WRONG = 1.0, 0.0  # scores that count as such; what lies between (TextVQA's accuracy) is neither


def write_pairs(
    right: Path,
    wrong: Sequence[Path],
    output: Path,
    data_root: Path,
    *,
    split: str = "train",
    every_question: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Writes pairs as {id, prompt, images, chosen, rejected} lines, read by `format: preference`.

    right, wrong: folders that `mmkd evaluate --split` wrote, with the same benchmarks in each. A question gives one pair
    for each different wrong answer. data_root: the pictures' names are relative to it. every_question: pairs also where no model
    is wrong (see above; our choice), with one of the answers to the same question elsewhere, drawn with `seed`.

    Returns counts by benchmark. Raises DataError for answers to questions of another split than `split` (pairs of test
    questions would spoil the test), for models that answered different questions, for pictures outside `data_root`, and
    where no pair is found.
    """
    counts: dict[str, dict[str, int]] = {}
    lines: list[str] = []
    for name in _benchmarks(right, wrong):
        runs = {str(folder): _answers(folder / name, split) for folder in (right, *wrong)}
        elsewhere = _said(runs.values()) if every_question else {}
        found = Counter({"questions": 0, "right and wrong": 0, "pairs": 0})
        for identifier in same_questions(runs):
            rows = [rows[identifier] for rows in runs.values()]
            wrong_answers = _wrong(rows[1:])
            rejected = wrong_answers or _other(rows[0], elsewhere, f"{seed} {identifier}")
            pairs = list(_pairs_of(rows[0], rejected, f"{name}/{identifier}", data_root))
            lines += [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
            found.update({"questions": 1, "right and wrong": bool(pairs and wrong_answers), "pairs": len(pairs)})
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


def _wrong(rows: Sequence[dict]) -> list[str]:
    """The wrong answers to a question in the order of the models, each once."""
    wrong = (_said_in(row) for row in rows if not row["skipped"] and row["score"] <= WRONG)
    return [answer for answer in dict.fromkeys(wrong) if answer]


def _said_in(row: Mapping) -> str:
    """A row's answer without its thinking, "" for none."""
    return (answer_of(row) or "").strip()


def _said(runs: Iterable[Mapping[str, dict]]) -> dict[str, list[str]]:
    """{question: all different answers of all models to it, on any picture}."""
    said: dict[str, set[str]] = {}
    for rows in runs:
        for row in rows.values():
            said.setdefault(row["question"], set()).add(_said_in(row))
    return {question: sorted(answers - {""}) for question, answers in said.items()}


def _other(right: dict, said: Mapping[str, Sequence[str]], seed: str) -> list[str]:
    """One of the answers `said` to the same question that no reference has; none where there is none."""
    true = {normalise_evalai(answer) for answer in (_said_in(right), *right["references"])}
    others = [answer for answer in said.get(right["question"], ()) if normalise_evalai(answer) not in true]
    return [random.Random(seed).choice(others)] if others else []


def _pairs_of(right: dict, rejected: Sequence[str], name: str, data_root: Path) -> Iterator[dict]:
    if right["skipped"] or right["score"] < RIGHT:
        return
    chosen = _said_in(right)
    images = [_relative(key, data_root) for key in right["images"]]
    for number, answer in enumerate(answer for answer in rejected if answer != chosen):
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

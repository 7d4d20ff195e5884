"""Stages that write data among those that train: where they stand, and what they may name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmkd.data.spec import DataSpec
from mmkd.errors import did_you_mean
from mmkd.writing.spec import STUDENT

# Of a data entry that reads what a stage wrote: all else follows from that stage.
NOT_WRITTEN = ("card", "format", "root", "files", "target", "answers")


def split_stages(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe with its write stages apart, each with the train stage that it stands before."""
    stages = given.get("stages")
    if not isinstance(stages, dict) or not any(_writes(stage) for stage in stages.values()):
        return given
    train = [name for name, stage in stages.items() if not _writes(stage)]
    order = list(stages)
    writes = {}
    for name, stage in stages.items():
        if _writes(stage):
            behind = [other for other in order[order.index(name) + 1 :] if other in train]
            writes[name] = {**stage, "before": behind[0] if behind else None}
    return {**given, "stages": {name: stages[name] for name in train}, "writes": writes}


def _writes(stage: Any) -> bool:
    return isinstance(stage, dict) and stage.get("kind") == "write"


def write_errors(recipe: Any) -> list[str]:
    """What is wrong with a recipe's write stages, and with the data entries that read them."""
    wrong = []
    known = {**dict.fromkeys(recipe.teacher_specs), STUDENT: None}
    names = list(recipe.writes)
    for number, (name, spec) in enumerate(recipe.writes.items()):
        where = f"stages.{name}"
        wrong += [f"{where}: there is a train stage of that name, too"] if name in recipe.stages else []
        wrong += [f"{where}.by: there is no teacher {author!r}; {did_you_mean(author, known)}, or give an endpoint"
                  for author in spec.by if isinstance(author, str) and author not in known]  # fmt: skip
        if spec.before is None:
            wrong.append(f"{where}: no stage that trains comes after it, so nobody reads what it writes")
        wrong += [f"{where}.by: {author} is the student itself; write by: student" for author in spec.by
                  if isinstance(author, str) and (one := recipe.teacher_specs.get(author)) and one.self]  # fmt: skip
        for other in spec.context.values():
            if other not in names[:number]:
                wrong.append(f"{where}.context: no write stage {other!r} stands before it; {did_you_mean(other, names[:number])}")
        wrong += [
            f"{where}.data.{n}.{error}" for n, entry in enumerate(spec.data) for error in _entry_errors(entry, names[:number])
        ]
    order = list(recipe.stages)
    for name, stage in recipe.stages.items():
        before = order[: order.index(name) + 1]
        there = [other for other, spec in recipe.writes.items() if spec.before in before]
        wrong += [
            f"stages.{name}.data.{n}.{error}" for n, entry in enumerate(stage.data) for error in _entry_errors(entry, there)
        ]
    late = [name for name in names if after_training(recipe, name)]
    if late and recipe.teacher is not None and recipe.teacher.keep:
        wrong.append(f"teacher.keep: what stage {late[0]} writes is known in the middle of training alone; take `keep` out")
    return wrong


def _entry_errors(entry: DataSpec, there: list[str]) -> Iterator[str]:
    if entry.from_ is None:
        return
    if entry.from_ not in there:
        yield f"from: no write stage {entry.from_!r} stands before it; {did_you_mean(entry.from_, there)}"
    if taken := [key for key in NOT_WRITTEN if getattr(entry, key) not in (None, False)]:
        yield f"from: {', '.join(taken)} cannot go with it; the rows are as stage {entry.from_} wrote them"


def after_training(recipe: Any, name: str) -> bool:
    """Whether what a stage writes depends on a student that was trained before it."""
    spec = recipe.writes[name]
    first = next(iter(recipe.stages))
    if spec.by_student and spec.before != first:
        return True
    return any(other in recipe.writes and after_training(recipe, other) for other in sources(spec))


def sources(spec: Any) -> list[str]:
    """The write stages whose rows a stage reads."""
    return [entry.from_ for entry in spec.data if entry.from_ is not None] + list(spec.context.values())


def students_writes(recipe: Any, stage: Any) -> list[str]:
    """The stages that write with a trained student and that a train stage reads."""
    return [entry.from_ for entry in stage.data if entry.from_ in recipe.writes and after_training(recipe, entry.from_)]

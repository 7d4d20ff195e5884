"""Rounds: stages that a recipe runs several times in a row, written out before the recipe is validated."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import Field

from mmkd.base.schema import Strict, is_default
from mmkd.errors import did_you_mean


class RoundsSpec(Strict):
    """Stages that run `times` times in a row, each round from the student of the one before.

    until: stall: no further round after one whose student is not better on the validation split than the best before; the best
    round's student is taken.  keep: a round also learns from what earlier rounds wrote. `NAME_2` is the stage NAME in round 2.
    A stage that reads one behind it in the round reads what the round before wrote, with `keep` all rounds before.
    """

    stages: list[str] = Field(min_length=1)  # names of the stages of a round
    times: int = Field(ge=1, le=100)  # rounds, at most
    until: Literal["stall"] | None = None
    keep: bool = False
    # The stages of each round by name, as the recipe has them then.
    names: list[list[str]] = Field([], exclude_if=is_default([]))


def written_out(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe with the stages of all its rounds. Raises ValueError."""
    rounds, stages = given.get("rounds"), given.get("stages")
    if not isinstance(rounds, dict) or not isinstance(stages, dict) or rounds.get("names"):
        return given
    spec = RoundsSpec.model_validate(rounds)
    order = list(stages)
    if unknown := [name for name in spec.stages if name not in stages]:
        raise ValueError(f"rounds.stages: there is no stage {unknown[0]!r}; {did_you_mean(unknown[0], order)}")
    start = order.index(spec.stages[0])
    if order[start : start + len(spec.stages)] != spec.stages:
        listed = ", ".join(spec.stages)
        raise ValueError(f"rounds.stages: {listed} do not stand one after another in `stages`; name them in that order")
    names = [[_name(name, number) for name in spec.stages] for number in range(1, spec.times + 1)]
    if taken := [name for row in names[1:] for name in row if name in stages]:
        raise ValueError(f"rounds: round {taken[0].rpartition('_')[2]} needs the name {taken[0]!r}, which another stage has")
    made = {name: stages[name] for name in order[:start]}
    for number in range(1, spec.times + 1):
        made |= {_name(name, number): _of_round(name, stages[name], spec, number) for name in spec.stages}
    made |= {name: _of_round(name, stages[name], spec, spec.times) for name in order[start + len(spec.stages) :]}
    return {**given, "stages": made, "rounds": {**rounds, "names": names}}


def _name(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _of_round(name: str, stage: Any, spec: RoundsSpec, number: int) -> Any:
    """A stage of a round, which reads what that round wrote; with `keep` what earlier ones wrote, too."""
    if not isinstance(stage, dict):
        return stage
    found = copy.deepcopy(stage)
    data: list[Any] = []
    for entry in stage.get("data") or ():
        if not isinstance(entry, dict) or entry.get("from") not in spec.stages:
            data.append(entry)
            continue
        behind = name in spec.stages and spec.stages.index(entry["from"]) > spec.stages.index(name)
        last = number - 1 if behind else number
        first = 1 if spec.keep and (behind or stage.get("kind") != "write") else max(1, last)
        data += [{**entry, "from": _name(entry["from"], n)} for n in range(first, last + 1)]
    if stage.get("data"):
        # Nothing was written before round 1: where that leaves nothing, the entries stay, and the recipe says what is wrong.
        found["data"] = data or stage["data"]
    if number > 1 and isinstance(stage.get("context"), dict):
        found["context"] = {
            key: _name(other, number) if other in spec.stages else other for key, other in stage["context"].items()
        }
    return found

"""What each of several teachers brought to a run: read from the student's log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.base.jsonl import log_rows
from mmkd.recipes.recipe import Recipe
from mmkd.terms.mixture import FACTS

Brought = dict[str, dict[str, dict[str, dict[str, float | None]]]]  # by stage, term and teacher


def brought(recipe: Recipe, run: Path) -> Brought:
    """{stage: {term: {teacher: {"weight", "used", "agreement", "lead"}}}}, means over the stage's log.

    used: the share of rows at which its weight is the largest; agreement and lead are of these alone, None where there are none.
    """
    rows = list(log_rows(run / "log" / "student.jsonl"))
    found: Brought = {}
    for stage, spec in recipe.stages.items():
        own = [row for row in rows if row.get("stage") == stage]
        for term in spec.build_terms() if own else ():
            of_term = {name: facts for name in term.several if (facts := _of_teacher(own, f"{term.name}.{name}"))}
            if of_term:
                found.setdefault(stage, {})[term.name] = of_term
    return found


def _of_teacher(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float | None]:
    told = [[row.get(f"{prefix}.{fact}") for fact in FACTS] for row in rows]
    known = [values for values in told if all(isinstance(x, int | float) and math.isfinite(x) for x in values)]
    if not known:
        return {}
    used = sum(values[1] for values in known)
    mean = lambda n: sum(values[n] for values in known) / len(known)  # noqa: E731
    where_used = lambda n: sum(values[n] * values[1] for values in known) / used if used else None  # noqa: E731
    return {"weight": mean(0), "used": mean(1), "agreement": where_used(2), "lead": where_used(3)}


def brought_lines(found: Brought) -> list[str]:
    """The same for the terminal."""
    lines = []
    for stage, terms in found.items():
        for term, teachers in terms.items():
            lines.append(f"what each teacher brought to {term} of stage {stage}")
            width = max(map(len, teachers))
            for name, own in teachers.items():
                where = "" if own["lead"] is None else (
                    f"; there the student agrees at {100 * own['agreement']:.1f} % and the lead is {own['lead']:+.2f} nats"
                )
                shares = f"weight {own['weight']:.2f}, the largest at {100 * own['used']:.1f} % of rows"
                lines.append(f"  {name:<{width}} {shares}{where}")
    return lines

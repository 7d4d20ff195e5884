"""ScienceQA: the letter by LLaVA's strict rule, and the usual break-down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.evaluation.tasks.letters import StrictLetters, scienceqa_parse
from mmkd.registry import register


@register("parsers", "scienceqa")
class ScienceQA(StrictLetters):
    """The letter by LLaVA's strict rule; the score by a reader's rule stands beside it."""

    def parse(self, text: str, choices: Sequence[str]) -> str | None:
        return scienceqa_parse(text, len(choices))

    def aggregate(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        return {"scienceqa": scienceqa(rows)}


def scienceqa(rows: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """ScienceQA's usual break-down of rows with "score", "parsed" and "categories" (modality, subject,
    grades).

    Returns {"all" | "image" | "text" | "<subject>" | "grades 1-6" | "grades 7-12": {"n", "score",
    "unparsed_share"}}. "image" is what others call ScienceQA-IMG.
    """
    groups: dict[str, list[Mapping]] = {"all": list(rows)}
    for row in rows:
        labels = dict(row["categories"])
        names = [labels.get("modality"), labels.get("subject")]
        names += [f"grades {labels['grades']}"] if "grades" in labels else []
        for name in filter(None, names):
            groups.setdefault(name, []).append(row)
    return {name: _group_score(members) for name, members in groups.items() if members}


def _group_score(rows: Sequence[Mapping]) -> dict[str, float]:
    return {
        "n": len(rows),
        "score": math.fsum(row["score"] for row in rows) / len(rows),
        "unparsed_share": sum(row["parsed"] is None for row in rows) / len(rows),
    }

"""`--seeds`: the same recipe once a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def run_seeds(recipe: Any, text: str, run: Callable[[Any], dict[str, Any]]) -> None:
    """Runs a recipe once for each seed of "0,1,2" and prints means with intervals. Raises DataError."""
    from mmkd.errors import DataError
    from mmkd.runs.seeds import distill_seeds, seeds_table

    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--seeds {text!r} is not of the form 0,1,2") from error
    print(seeds_table(distill_seeds(recipe, seeds, run)))

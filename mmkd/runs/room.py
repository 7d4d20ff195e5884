"""Whether a run can write where it is to write, and whether what it will write fits: asked before anything is trained."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mmkd.base.files import MIB, existing, size_of
from mmkd.errors import one_line
from mmkd.recipes.recipe import Recipe
from mmkd.towers.tower import Tower
from mmkd.train.checkpoints import KEPT

ADAMW = 2  # averages of a trained parameter in the optimiser's state


def needed_bytes(recipe: Recipe, student: Tower) -> int:
    """The most that a run has on its disk at a time, about: students of all stages and roles, checkpoints with the optimiser."""
    weights = sum(p.numel() * p.element_size() for p in student.model.parameters())
    controls = len(recipe.controls) if recipe.teacher_specs else 0
    models = (1 + controls) * (len(recipe.stages) + 1) + controls  # each stage's and a copy of the last; controls' once more
    checkpoints = (KEPT + 1) * (1 + ADAMW)
    return weights * (models + checkpoints)


def room_errors(recipe: Recipe, student: Tower) -> list[str]:
    """What is wrong with the output folder: it cannot be written to, or its disk has too little room left."""
    run = Path(recipe.output)
    try:
        there = existing(run)
        if not there.is_dir():
            return [f"output: {one_line(there, 200)} is a file; take another folder"]
        with tempfile.TemporaryDirectory(prefix=".mmkd-", dir=there):
            pass
        free = shutil.disk_usage(there).free
        written = size_of(run) if run.is_dir() else 0
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or one_line(error)
        return [f"output: {one_line(run, 200)} cannot be written to ({told}); take another folder"]
    needed = needed_bytes(recipe, student)
    if needed - written > free:
        return [
            f"output: the run needs about {needed / MIB:,.0f} MiB for students and checkpoints, {written / MIB:,.0f} of it are "
            f"written, but {there} has only {free / MIB:,.0f} MiB left; make room or take another disk (output=FOLDER)"
        ]
    return []

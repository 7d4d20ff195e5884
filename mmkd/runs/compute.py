"""What training computes, in floating point operations: the same on every machine, however busy it is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.teachers.teacher import Teacher
from mmkd.towers.tower import Tower
from mmkd.train.build_stage import build_stage

SAMPLES = 16  # of a stage that are counted


def operations(recipe: Recipe, student: Tower, teachers: Mapping[str, Teacher]) -> dict[str, int]:
    """Floating point operations of a step on some samples, by stage: forward and backward passes, the teachers' passes with them.

    Matrix products, convolutions and attention count, as PyTorch's counter has them; what a stored teacher computed when its
    cache was written does not. `student` is changed as the stages change it (experts); its weights are not trained.
    Raises DataError, TowerError.
    """
    settings, found = recipe.model_copy(update={"compile": False}), {}
    for name, spec in recipe.stages.items():
        samples = stage_samples(recipe, spec)
        some = list(itertools.islice(samples, 0, None, max(1, len(samples) // SAMPLES)))[:SAMPLES]
        stage = build_stage(name, spec, settings, student, teachers, some)
        stage.distiller.train()
        half = spec.precision == "bfloat16"
        with (
            FlopCounterMode(display=False) as counter,
            torch.autocast(stage.student.device.type, torch.bfloat16) if half else nullcontext(),
        ):
            batch = stage.batch_of(spec.optimiser.micro_batch_size or SAMPLES)  # with what the answers of the student cost
            stage.distiller(batch)[0].backward()
        stage.distiller.zero_grad()
        stage.leave()
        found[name], student = counter.get_total_flops(), stage.student
    return found

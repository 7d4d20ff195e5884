"""`mmkd check RUN/not_finite`: puts a kept batch through student and teachers again and says where it stops being finite."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

from mmkd.errors import DataError, one_line
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import all_samples, texts_of
from mmkd.runs.towers import build_student, load_student, load_teachers
from mmkd.train.batch_file import load_batch
from mmkd.train.build_stage import build_stage
from mmkd.train.distiller import Distiller
from mmkd.train.finite import FOLDER, REPORT, WEIGHTS


def is_kept(folder: Path) -> bool:
    """Whether `mmkd check` was given what a run kept of steps that were not finite."""
    return (folder / REPORT).is_file() or folder.name == FOLDER


def replay_all(folder: Path) -> dict[str, Any]:
    """Replays one kept step, or all of a run's; {folder: facts}. Raises DataError, TowerError."""
    folders = [folder] if (folder / REPORT).is_file() else sorted(path.parent for path in folder.glob(f"*/{REPORT}"))
    if not folders:
        raise DataError(f"{folder} holds no step that was kept; a run writes them below RUN/{FOLDER}")
    return {str(one): replay(one) for one in folders}


def replay(folder: Path) -> dict[str, Any]:
    """What one kept step computes again: loss, terms, the gradient's norm by part, and the first module that is not finite.

    The student has the weights from before the step where they were kept, else those that its stage began with.
    """
    report = _report(folder)
    if not report["recipe"]:
        return _without_recipe(report, folder)
    recipe = validate(report["recipe"], str(folder / REPORT), Recipe)
    teachers = load_teachers(recipe)
    student = _student(recipe, report, folder, teachers)
    stage = build_stage(report["stage"], recipe.stages[report["stage"]], recipe, student, teachers, [])
    if report["weights"]:
        try:
            load_model(stage.distiller, folder / WEIGHTS, device=str(student.device))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DataError(f"{folder / WEIGHTS} cannot be read: {one_line(error)}") from error
    facts: dict[str, Any] = {key: report[key] for key in ("role", "stage", "step", "samples")}
    facts["weights"] = "as before the step" if report["weights"] else "as before the stage"
    counts = torch.tensor(report["counts"]) if report["counts"] else None
    for number in report["batches"]:
        batch = load_batch(folder / f"batch_{number}").to(student.device)
        facts[f"batch {number}"] = _replay_batch(stage.distiller, batch, counts, report["progress"])
    facts["finite"] = all(_is_finite(fact) for fact in facts.values())
    return facts


def _without_recipe(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of `mmkd rank`, whose steps depend on a table of scores: what the batch itself holds."""
    facts: dict[str, Any] = {key: report[key] for key in ("role", "stage", "step", "samples", "not_finite")}
    for number in report["batches"]:
        batch = load_batch(folder / f"batch_{number}", object)
        parts = {name: part for name, part in vars(batch).items() if isinstance(part, dict)}
        facts[f"batch {number}"] = {
            f"{name}.{key}": bool(value.isfinite().all()) for name, part in parts.items() for key, value in part.items()
        }
    return facts | {"replayed": False, "finite": False}


def _report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        wanted = {"role": str, "stage": str, "step": int, "samples": list, "batches": list, "weights": bool, "recipe": dict}
        wrong = [key for key, kind in wanted.items() if not isinstance(report[key], kind)]
        wrong += ["stage"] if report["recipe"] and report["stage"] not in report["recipe"]["stages"] else []
        if wrong or not all(isinstance(number, int) for number in report["batches"]):
            raise ValueError(f"odd values of {', '.join(wrong) or 'batches'}")
        return {"counts": None, "progress": 0.0} | report
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / REPORT} is no report of a step: {type(error).__name__} {one_line(error)}") from error


def _student(recipe: Recipe, report: dict[str, Any], folder: Path, teachers: Any) -> Any:
    """The student as the stage met it."""
    number = list(recipe.stages).index(report["stage"])
    before = list(folder.absolute().parent.parent.glob(f"stages/{report['role']}/{number - 1}_*/model")) if number else []
    return load_student(recipe, before[0]) if before else build_student(recipe, teachers, texts_of(all_samples(recipe)))


def _replay_batch(distiller: Distiller, batch: Any, counts: Tensor | None, progress: float) -> dict[str, Any]:
    distiller.train()
    models = {"student": distiller.tower.model}
    models |= {name: t.running().model for name, t in distiller.teachers.items() if not t.stored}
    with _first_not_finite(models) as first:
        loss, terms = distiller(batch, counts, progress)
    facts: dict[str, Any] = {"loss": float(loss), **{name: float(total) for name, (total, _) in terms.items()}}
    if loss.requires_grad:
        loss.backward()
        for part, parameters in distiller.tower.part_parameters().items():
            grads = [p.grad for _, p in parameters if p.grad is not None]
            facts[f"gradient of {part}"] = float(nn.utils.get_total_norm(grads)) if grads else 0.0
    distiller.zero_grad()
    return facts | ({"first not finite": first[0]} if first else {})


@contextmanager
def _first_not_finite(models: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Names modules whose output is not finite, the first one first."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
                found.append(name)

        return look

    handles = [
        module.register_forward_hook(watch(f"{role}.{name}"))
        for role, model in models.items() for name, module in model.named_modules() if name and not any(module.children())
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(fact: Any) -> bool:
    return all(map(_is_finite, fact.values())) if isinstance(fact, dict) else not isinstance(fact, float) or math.isfinite(fact)

"""The teachers and the student of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmkd.errors import TowerError
from mmkd.recipes.recipe import Recipe
from mmkd.registry import import_modules, registry
from mmkd.runs.machine import use_machine
from mmkd.teachers.live import as_teachers
from mmkd.teachers.opening import Opening
from mmkd.teachers.teacher import Teacher
from mmkd.terms.spec import build_terms
from mmkd.terms.term import terms_of_teacher
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, load_tokenizer, train_tokenizer
from mmkd.towers.fresh import draw_vision_anew
from mmkd.towers.kept import PreparedSamples
from mmkd.towers.loading import device_of_process, dtype_of, to_device
from mmkd.towers.reading import AS_SAVED
from mmkd.towers.spec import AssembleSpec
from mmkd.towers.tower import Tower

PREPARED = PreparedSamples()  # shared by all towers that this process trains and compares


def openings(recipe: Recipe) -> dict[str, Opening]:
    """What each teacher of a recipe is opened for."""
    specs = recipe.teacher_specs
    terms = {stage: build_terms(spec.terms) for stage, spec in recipe.stages.items()}
    found = {}
    for name in specs:
        own = {stage: terms_of_teacher(its, name, specs) for stage, its in terms.items()}
        precision = {stage: recipe.stages[stage].precision for stage, its in own.items() if its}
        found[name] = Opening(name, recipe.max_length, own, precision)
    return found


def load_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The teachers of a recipe by name. Raises DataError, TowerError.

    The first thing that is done with a machine: what it cannot do is refused here, and the process takes its device.
    """
    use_machine(recipe)
    opened = openings(recipe)
    return {
        name: registry("teachers").get(spec.registered).open(spec, opened[name]) for name, spec in recipe.teacher_specs.items()
    }


def build_student(recipe: Recipe, teachers: Mapping[str, Teacher] | Teacher | None, texts: Iterable[str]) -> Tower:
    """The student before its first stage. `texts` train its tokenizer where the recipe asks for one."""
    teachers = as_teachers(teachers)
    student = _build_student(recipe, teachers, texts)
    for teacher in teachers.values():
        teacher.meet(student)
        teacher.body.preparer.kept = PREPARED
    return student


def _build_student(recipe: Recipe, teachers: Mapping[str, Teacher], texts: Iterable[str]) -> Tower:
    spec = recipe.student
    if spec.model is not None:
        tower = load_student(recipe, spec.model)
        if spec.fresh:
            draw_vision_anew(tower, recipe.seed)
        return tower
    parts = spec.assemble
    if parts.import_module:
        import_modules([parts.import_module])
    size = parts.vision.image_size
    vision = {k: v for k, v in parts.vision.model_dump(exclude={"image_size"}).items() if v is not None}
    tower = assemble(
        VisionSpec(**vision, image_size=(size, size) if isinstance(size, int) else size),
        LanguageSpec(**parts.language.model_dump()),
        projector=parts.projector,
        projector_options=parts.projector_options,
        tokenizer=_tokenizer(parts, teachers, texts),
        max_length=recipe.max_length,
        seed=recipe.seed,
        dtype=torch.float32 if spec.dtype == "auto" else dtype_of(spec.dtype),
    )
    if spec.reading != AS_SAVED:
        tower = Tower(tower.model, tower.processor, max_length=recipe.max_length, reading=spec.reading)
    if spec.attn_implementation is not None:
        tower.model.set_attn_implementation(spec.attn_implementation)
    return _as_student(tower)


def load_student(recipe: Recipe, folder: Any) -> Tower:
    """A student from a folder or hub id, as the recipe has it. Raises TowerError."""
    spec = recipe.student
    return _as_student(
        Tower.load(
            folder, dtype=dtype_of(spec.dtype), trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attn_implementation, device=device_of_process(), max_length=recipe.max_length,
            reading=spec.reading,
        )
    )  # fmt: skip


def _as_student(tower: Tower) -> Tower:
    """The tower on its device, sharing prepared samples. Raises TowerError for one that can only be a teacher of rows."""
    tower.preparer.kept = PREPARED
    if not tower.has_visual_tokens:
        raise TowerError(f"the student {tower.lacks()}, so it can only be a teacher of rows; take another student")
    return to_device(tower)


def _tokenizer(parts: AssembleSpec, teachers: Mapping[str, Teacher], texts: Iterable[str]) -> Any:
    spec = parts.tokenizer
    if spec is None:
        return None
    if spec.vocab_size is not None:
        return train_tokenizer(texts, spec.vocab_size)
    return next(iter(teachers.values())).tokenizer if spec.source == "teacher" else load_tokenizer(spec.source)

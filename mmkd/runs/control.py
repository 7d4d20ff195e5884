"""What a student is held against: controls, the same student put through the stages without the teacher."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mmkd
from mmkd.base.distributed import alone_in, is_main_process, wait_for_all
from mmkd.base.files import write_whole
from mmkd.base.run_folder import take_control
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.evaluation.roles import HARD_ANSWERS
from mmkd.recipes.controls import ControlSpec, TuningSpec, changed
from mmkd.recipes.recipe import Recipe
from mmkd.recipes.writes import students_writes
from mmkd.runs.compute import operations
from mmkd.runs.data import data_state, stage_samples
from mmkd.runs.plateau import plateau_facts
from mmkd.runs.stages import seconds_of, train
from mmkd.runs.teacher_answers import all_by_teacher
from mmkd.runs.tuned import tuned
from mmkd.runs.validation import validation_scores
from mmkd.runs.work import Work
from mmkd.teachers.teacher import Teacher
from mmkd.terms.spec import TermSpec
from mmkd.towers.tower import Tower
from mmkd.train.experts import summarise_experts
from mmkd.train.spec import StageSpec

logger = logging.getLogger(__name__)

CONTROL_TERMS = {"cross_entropy": TermSpec(kind="cross_entropy")}
FACTS = "controls.json"  # of a run: what each control was


def role_of(name: str, kind: str) -> str:
    """Under which role a control's model, log and answers stand: the one of equal steps is "control"."""
    if kind == HARD_ANSWERS:
        return HARD_ANSWERS if name == HARD_ANSWERS else f"{HARD_ANSWERS}_{name}"
    return "control" if name == "equal_steps" else f"control_{name}"


def control_recipe(recipe: Recipe, control: ControlSpec | None = None, longer: Mapping[str, float] | None = None) -> Recipe:
    """The recipe of a control: everything the same without the teacher.

    Its terms are the stage's `control_terms`, else those of the student that need no teacher, with cross-entropy in
    place of the others. Data that the teacher answered are left out, but for hard answers, which are learnt from nothing else.
    longer: by stage, how many times the student's steps (or epochs). Raises DataError where a stage is left without data.
    """
    stages, free = {}, control is None or control.kind != HARD_ANSWERS
    for name, stage in recipe.stages.items():
        terms = {n: _on_responses(spec) for n, spec in (stage.control_terms or _without_teacher(stage)).items()}
        own = stage.model_copy(update={"terms": terms, "control_terms": None, "answers": {"data": 1.0}, "monitor": None})
        if own.until is not None and own.until.kind == "golden":  # there is no teacher that it could come closer to
            own = own.model_copy(update={"until": None})
        if own.sampler is not None and getattr(own.sampler.order(), "of_teacher", False):
            own = own.model_copy(update={"sampler": None})
        keys = control.stages.get(name, {}) if control is not None else {}
        if free and "data" not in keys:
            own = own.model_copy(update={"data": _labelled(name, stage)})
        if any(entry.mixup is not None for entry in own.data):  # an answer is learned from its own picture
            own = own.model_copy(update={"data": [entry.model_copy(update={"mixup": None}) for entry in own.data]})
        if longer is not None and not {"steps", "epochs"} & keys.keys():
            own = own.model_copy(update=_times(own, longer[name]))
        stages[name] = changed(own, keys)
    return recipe.model_copy(update={"stages": stages, "teacher": None, "teachers": {}, "writes": {}, "rounds": None})


def _on_responses(spec: TermSpec) -> TermSpec:
    """A term where all answers are the data's."""
    return spec.model_copy(update={"positions": "response"}) if spec.positions == "given" else spec


def _labelled(name: str, stage: StageSpec) -> list[DataSpec]:
    """The data of a stage that the teacher has not answered."""
    found = [spec for spec in stage.data if spec.target != "teacher" and spec.from_ is None]
    if not found:
        raise DataError(
            f"stage {name}: all its data are answered or written by a teacher, so a control without one has nothing to learn "
            "from; take "
            f"`controls: [hard_answers]` alone, or give it data: equal_steps: {{stages: {{{name}: {{data: [...]}}}}}}"
        )
    return found


def _times(stage: StageSpec, factor: float) -> dict[str, Any]:
    if stage.steps is not None:
        return {"steps": math.ceil(stage.steps * factor)}
    return {"epochs": (stage.epochs or 1.0) * factor}


def _without_teacher(stage: StageSpec) -> dict[str, TermSpec]:
    terms = {name: spec.build(name) for name, spec in stage.terms.items()}
    # A control generates nothing, so a term on the student's own answers would leave it without a loss.
    kept = {name: stage.terms[name] for name, term in terms.items() if not term.needs_teacher and term.positions != "generated"}
    learns = len(kept) == len(stage.terms) or any(spec.kind in CONTROL_TERMS for spec in kept.values())
    return kept if learns else kept | CONTROL_TERMS


def control_errors(recipe: Recipe) -> list[str]:
    """Why controls cannot be trained."""
    found = []
    for name, control in recipe.controls.items() if recipe.teacher_specs or recipe.writes else ():
        late = [other for stage in recipe.stages.values() for other in students_writes(recipe, stage)]
        if control.kind == HARD_ANSWERS and late:
            found.append(f"controls.{name}: what stage {late[0]} writes depends on the trained student; take this control out")
            continue
        try:
            control_recipe(recipe, control)
        except DataError as error:
            found.append(f"controls.{name}: {error}")
    return found


def control_key(recipe: Recipe, student: Tower) -> str:
    """What defines a control, given its own recipe: untrained weights and processor, stages with their data, seed, version."""
    stages = recipe.model_dump(mode="json", include={"stages", "seed", "max_length"})
    data = [data_state(recipe, stage) for stage in recipe.stages.values()]
    chosen = [recipe.evaluation.model_dump(mode="json")] if any(stage.until for stage in recipe.stages.values()) else []
    facts = json.dumps([mmkd.__version__, student.fingerprint(), stages, data, *chosen], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def train_controls(
    recipe: Recipe, fresh: Callable[[], Tower], teachers: Mapping[str, Teacher], run: Path,
    live: Mapping[str, Teacher] | None = None, work: Work | None = None,
) -> dict[str, Tower]:  # fmt: skip
    """All controls of a recipe by role.

    fresh: the student before its first stage.  live: the teachers that this run has read once for what it keeps (`teachers` then
    are what is kept).  work: all that the run trains, for how long it will take.
    """
    towers, facts = {}, {}
    counted: dict[str, dict[str, int]] = {}
    live = teachers if live is None else live
    for name, control in recipe.controls.items():
        longer, of = None, recipe
        if control.kind == HARD_ANSWERS:
            of = all_by_teacher(recipe, live)
        if control.kind in ("equal_compute", HARD_ANSWERS):
            counted = counted or _counted(recipe, fresh, teachers, live)
            if work is not None:
                work.counted(counted)
            longer = {stage: _ratio(recipe, stage, counted) for stage in recipe.stages}
        own, role = control_recipe(of, control, longer), role_of(name, control.kind)
        logger.info("control %s: %s", name, ", ".join(f"{stage} {_length(spec)}" for stage, spec in own.stages.items()))
        found: dict[str, Any] = {}
        if control.kind == "tuned":
            own, found = _tuned(own, control, fresh, run, work)
        towers[role], trained = train_control(own, fresh(), run, role, work, f"control {name}")
        facts[role] = {"name": name, "kind": control.kind} | trained | found
        if longer is not None:
            facts[role]["operations"] = {"of": "one step on the same samples, student and control", **counted}
    if facts and is_main_process():
        write_whole(run / FACTS, json.dumps(facts, indent=1) + "\n")
    return towers


def _counted(
    recipe: Recipe, fresh: Callable[[], Tower], teachers: Mapping[str, Teacher], live: Mapping[str, Teacher]
) -> dict[str, dict[str, int]]:
    """Operations of a step by stage, of the student and of its control; "once" those of the passes that a run keeps."""
    found = {
        "student": operations(recipe, fresh(), teachers),
        "control": operations(control_recipe(recipe, ControlSpec(kind=HARD_ANSWERS)), fresh(), {}),  # on the same data
    }
    if live is not teachers:
        whole = operations(recipe, fresh(), live)
        found["once"] = {stage: whole[stage] - found["student"][stage] for stage in recipe.stages}
    return found


def _ratio(recipe: Recipe, stage: str, counted: Mapping[str, Mapping[str, int]]) -> float:
    """How many times its own steps the student's computation in a stage buys a control, at least once.

    What the run keeps is computed once for each sample, however often the stage draws it.
    """
    spec = recipe.stages[stage]
    samples = len(stage_samples(recipe, spec))
    drawn = spec.steps * spec.optimiser.batch_size if spec.steps is not None else (spec.epochs or 1.0) * samples
    student = counted["student"][stage] + counted.get("once", {}).get(stage, 0) * samples / drawn
    return max(1.0, student / counted["control"][stage])


def _length(stage: StageSpec) -> str:
    return f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs or 1:g} epochs"


def _tuned(
    own: Recipe, control: ControlSpec, fresh: Callable[[], Tower], run: Path, work: Work | None
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a control with the values that are best on the validation split."""

    def score(recipe: Recipe, tower: Tower) -> float:
        folder = shared_folder(recipe, fresh(), run) / "validation"
        found = validation_scores(recipe, tower, folder, "control", resume=True)
        return sum(found.values()) / len(found)

    def learn(recipe: Recipe) -> tuple[Tower, dict[str, Any]]:
        return train_control(recipe, fresh(), run, None, work, "control tuned")

    found, tried = tuned(own, control.tries or TuningSpec(), learn, score)
    return found, {"tuned": tried}


def train_control(
    own: Recipe, student: Tower, run: Path, role: str | None, work: Work | None = None, name_of: str | None = None
) -> tuple[Tower, dict[str, Any]]:
    """A control and what is known of its training; trained once for all runs beside this one that would train the very same.

    role: under which the run takes it; None: it is only one that was tried.  work, name_of: for the log, as in `train`.
    """
    shared = shared_folder(own, student, run)
    with alone_in(shared, "the SFT control of this one, too,", wait=True):
        control = train(own, "control", student, {}, shared, work, name_of)
    if role is not None and is_main_process():
        take_control(shared, run, role)
        summarise_experts(run)
    wait_for_all()
    facts: dict[str, Any] = {"seconds": round(seconds_of(shared, "control"), 1)}
    facts["steps"] = {stage: _length(spec) for stage, spec in own.stages.items()}
    if ended := plateau_facts(shared, "control"):
        facts["plateau"] = ended
    return control, facts


def shared_folder(own: Recipe, student: Tower, run: Path) -> Path:
    """Where a control lies for all runs beside this one."""
    return run.parent / "controls" / control_key(own, student)

"""How long the rest of a run takes: all stages, controls before the student."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmkd.recipes.recipe import Recipe
from mmkd.runs.work import Work, ratio


def recipe(controls, **second):
    stage = {"data": [{"format": "jsonl", "root": "x"}], "terms": {"forward_kl": 1}, "steps": 100, "optimiser": {"batch_size": 4}}
    return Recipe.model_validate({
        "title": "t", "output": "o", "teacher": {"model": "m"}, "student": {"model": "s"}, "controls": controls,
        "stages": {"one": stage, "two": stage | {"steps": 50} | second},
        "evaluation": {"benchmarks": ["b"], "validation": "val"},
    })  # fmt: skip


def tower(parameters):
    return SimpleNamespace(model=nn.ParameterList([nn.Parameter(torch.zeros(parameters))]))


def teacher(parameters, stored=False):
    return SimpleNamespace(tower=tower(parameters), stored=stored)


def work(controls, teachers=None, **second):
    return Work(recipe(controls, **second), tower(100), {"teacher": teacher(300)} if teachers is None else teachers)


def test_a_teacher_costs_its_pass_against_the_students_three():
    spec = recipe([]).stages["one"]
    assert ratio(spec, tower(100), {"teacher": teacher(300)}) == pytest.approx(2.0)
    assert ratio(spec, tower(100), {"teacher": teacher(300, stored=True)}) == 1.0
    assert ratio(spec, tower(100), {}) == 1.0


def test_what_is_behind_a_stage():
    run = work(["equal_steps", "equal_compute"])
    # Samples: 400 and 200. A control's takes 1 s, so the student's 2 s; the control of equal compute takes as long as it.
    assert run.behind("control equal_steps", "one")(1.0) == 200 + 2 * (2 * 600)
    assert run.behind("control equal_compute", "two")(1.0) == 2 * 600
    assert run.behind("student", "one")(3.0) == 200 * 3
    assert run.behind("student", "two")(3.0) is None
    assert run.behind("a control that is tried", "one")(1.0) is None


def test_operations_and_measured_paces_take_the_place_of_sizes():
    run = work(["equal_steps"])
    first = run.behind("control equal_steps", "one")
    run.counted({"student": {"one": 30, "two": 60}, "control": {"one": 10, "two": 10}})
    assert first(1.0) == 200 + 400 * 3 + 200 * 6
    student = run.behind("student", "one")
    assert student(2.0) == pytest.approx(200 * 2.0 * 6 / 3)  # a sample of the second stage takes twice as long
    run.behind("control equal_steps", "two")(0.5)
    assert run.behind("student", "one")(2.0) == pytest.approx(200 * 4.0)


def test_controls_of_other_lengths():
    assert work({"equal_steps": {"stages": {"two": {"steps": 150}}}}).behind("control equal_steps", "one")(1.0) == 600 + 2 * 600
    kind = {"kind": "equal_compute", "stages": {"one": {"steps": 10}, "two": {"steps": 10}}}
    assert work({"short": kind}).behind("control short", "one")(1.0) == 40 + 2 * 600
    tries = {"rates": [1.0, 2.0], "label_smoothing": [0.0], "targets": [None, "majority"]}
    run = work({"equal_steps": None, "tuned": {"tries": tries}})
    assert run.behind("control equal_steps", "two")(1.0) == 3 * 600 + 2 * 600


def test_without_a_teacher_there_is_the_student_alone():
    assert work(["equal_steps"], {}).behind("student", "one")(1.0) == 200

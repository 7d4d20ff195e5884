"""What each of several teachers brought, from the log to the terminal and the page."""

import json
from types import SimpleNamespace

import pytest
from tiny import make_term

from mmkd.evaluation.report.scores import brought_entries
from mmkd.runs.brought import brought, brought_lines
from mmkd.terms.term import Schedule


def recipe_of(**kinds):
    terms = [make_term(name, kind, Schedule(1, 1), options=(("teachers", {"a": 1, "b": 1}),)) for name, kind in kinds.items()]
    return SimpleNamespace(stages={"first": SimpleNamespace(build_terms=lambda: terms)})


def row(step, a, b, stage="first"):
    facts = ("weight", "used", "agreement", "lead")
    told = {f"mix.{name}.{fact}": value for name, own in (("a", a), ("b", b)) for fact, value in zip(facts, own, strict=True)}
    return {"stage": stage, "step": step, "loss": 1.0} | told


def test_means_over_a_stage_count_agreement_and_lead_where_the_teacher_was_used(tmp_path):
    (tmp_path / "log").mkdir()
    rows = [row(1, (0.8, 0.75, 0.5, 1.0), (0.2, 0.25, 0.0, -1.0)), row(2, (0.6, 0.25, 0.9, 2.0), (0.4, 0.75, 1.0, 3.0)),
            row(1, (9, 9, 9, 9), (9, 9, 9, 9), stage="other")]  # fmt: skip
    (tmp_path / "log" / "student.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = brought(recipe_of(mix="mixed_teachers"), tmp_path)
    assert found == {"first": {"mix": {
        "a": {"weight": pytest.approx(0.7), "used": 0.5, "agreement": pytest.approx(0.5 * 0.75 + 0.9 * 0.25),
              "lead": pytest.approx(1.25)},
        "b": {"weight": pytest.approx(0.3), "used": 0.5, "agreement": 0.75, "lead": pytest.approx(2.0)},
    }}}  # fmt: skip
    lines = brought_lines(found)
    assert lines[0] == "what each teacher brought to mix of stage first"
    where = "there the student agrees at 60.0 % and the lead is +1.25 nats"
    assert lines[1] == f"  a weight 0.70, the largest at 50.0 % of rows; {where}"
    assert brought_entries(found) == [("first, mix", [("a", found["first"]["mix"]["a"]), ("b", found["first"]["mix"]["b"])])]


def test_a_teacher_that_was_never_used_and_a_run_without_a_mixture(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "student.jsonl").write_text(json.dumps(row(1, (1.0, 1.0, 0.5, 0.1), (0.0, 0.0, 0.0, 0.0))) + "\n")
    found = brought(recipe_of(mix="mixed_teachers"), tmp_path)["first"]["mix"]
    assert found["b"] == {"weight": 0.0, "used": 0.0, "agreement": None, "lead": None}
    assert brought_lines({"first": {"mix": found}})[-1] == "  b weight 0.00, the largest at 0.0 % of rows"
    assert brought(recipe_of(other="mixed_teachers"), tmp_path) == {}
    assert brought(recipe_of(mix="mixed_teachers"), tmp_path / "none") == {}


@pytest.mark.parametrize("damaged", [None, [], {"s": 3}, {"s": {"t": []}}, {"s": {"t": {"a": 1}}}])
def test_a_damaged_summary_shows_nothing(damaged):
    assert brought_entries(damaged) == []
    assert brought_entries({"s": {"t": {"a": {"weight": "x", "lead": float("inf")}}}}) == [
        ("s, t", [("a", dict.fromkeys(("weight", "used", "agreement", "lead")))])
    ]

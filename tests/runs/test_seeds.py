"""What is left of leads over several seeds."""

import statistics

import pytest

from mmkd.runs.seeds import over_seeds, seeds_table


def summary(student, control, nll):
    lead = {"mean": student - control, "ci95": [0, 0], "nll": {"mean": nll, "ci95": [nll, nll], "n": 9}}
    entry = {"n": 9, "student": student, "student_ci95": [0, 1], "control": control, "control_ci95": [0, 1]}
    return {"benchmarks": {"a": entry | {"student_minus_best_control": lead | {"name": "equal_steps"}}}}


def test_leads_and_doubt_over_seeds():
    result = over_seeds({0: summary(0.7, 0.5, -0.2), 1: summary(0.8, 0.5, -0.4)})
    found = result["benchmarks"]["a"]
    assert found["student_minus_best_control"]["mean"] == pytest.approx(0.25)
    assert found["student_minus_best_control_nll"]["values"] == [-0.2, -0.4]
    assert found["student_minus_best_control_nll"]["mean"] == pytest.approx(statistics.mean([-0.2, -0.4]))
    shown = seeds_table(result)
    assert "NLL over the best control" in shown and "-0.300 [" in shown and shown.count("student_minus") == 0


def test_without_probabilities_there_is_no_doubt_to_tell():
    plain = {seed: summary(0.7, 0.5, 0.0) for seed in (0, 1)}
    for one in plain.values():
        del one["benchmarks"]["a"]["student_minus_best_control"]["nll"]
    result = over_seeds(plain)
    assert "student_minus_best_control_nll" not in result["benchmarks"]["a"] and "NLL" not in seeds_table(result)

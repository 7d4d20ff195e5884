"""What the models of a run are called: teachers by name, controls, the student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

STUDENT, TEACHER = "student", "teacher"
HARD_ANSWERS = "hard_answers"  # learnt from the teacher's answers alone


def is_control(role: str) -> bool:
    """Whether a model of this role learnt without the teacher: "control" (equal steps) or "control_NAME"."""
    return role == "control" or role.startswith("control_")


def learnt_answers(role: str) -> bool:
    """Whether a model of this role learnt from the teacher's answers alone."""
    return role.startswith(HARD_ANSWERS)


def in_words(role: str) -> str:
    """A role as it is shown: "control_equal_compute" is "control (equal compute)"."""
    if role.startswith("control_"):
        return f"control ({role.removeprefix('control_').replace('_', ' ')})"
    return role.replace("_", " ") if learnt_answers(role) else role


def ordered(roles: Iterable[str]) -> list[str]:
    """Several teachers by their names first, then the teacher, controls, hard answers, the student."""
    return sorted(sorted(roles), key=_rank)


def _rank(role: str) -> int:
    if is_control(role):
        return 2
    if learnt_answers(role):
        return 3
    return {TEACHER: 1, STUDENT: 4}.get(role, 0)


def best_control(scores: Mapping[str, float]) -> str | None:
    """The control with the highest score, of several equal ones the first; None where there is none."""
    controls = [role for role in ordered(scores) if is_control(role)]
    return max(controls, key=scores.__getitem__, default=None)

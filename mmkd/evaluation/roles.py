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
    name = role.removeprefix("control_")
    return f"control ({name.replace('_', ' ')})" if name != role else role.replace("_", " ") if learnt_answers(role) else role


def ordered(roles: Iterable[str]) -> list[str]:
    """Several teachers by their names first, then the teacher, controls, hard answers, the student."""
    def rank(role: str) -> int:
        if role in (TEACHER, STUDENT):
            return {TEACHER: 1, STUDENT: 4}[role]
        return 2 if is_control(role) else 3 if learnt_answers(role) else 0

    return sorted(sorted(roles), key=rank)


def best_control(scores: Mapping[str, float]) -> str | None:
    """The control with the highest score, of several equal ones the first; None where there is none."""
    controls = [role for role in ordered(scores) if is_control(role)]
    return max(controls, key=scores.__getitem__, default=None)

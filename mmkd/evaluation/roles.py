"""What the models of a run are called: teachers by name, controls, the student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

STUDENT, TEACHER = "student", "teacher"


def is_control(role: str) -> bool:
    """Whether a model of this role learnt without the teacher: "control" (equal steps) or "control_NAME"."""
    return role == "control" or role.startswith("control_")


def in_words(role: str) -> str:
    """A role as it is shown: "control_equal_compute" is "control (equal compute)"."""
    name = role.removeprefix("control_")
    return f"control ({name.replace('_', ' ')})" if name != role else role


def ordered(roles: Iterable[str]) -> list[str]:
    """Several teachers by their names first, then the teacher, controls, the student."""
    def rank(role: str) -> int:
        return {TEACHER: 1, STUDENT: 3}.get(role, 2 if is_control(role) else 0)

    return sorted(sorted(roles), key=rank)


def best_control(scores: Mapping[str, float]) -> str | None:
    """The control with the highest score, of several equal ones the first; None where there is none."""
    controls = [role for role in ordered(scores) if is_control(role)]
    return max(controls, key=scores.__getitem__, default=None)

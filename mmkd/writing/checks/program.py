"""Answers that are programs: they are run, in a sandbox."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from mmkd.base.sandbox import Ended, Limits, run_program, sandbox_refusal
from mmkd.errors import DataError
from mmkd.registry import register
from mmkd.writing.checks import Candidate, Check, Surroundings
from mmkd.writing.words import folded

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


@register("checks", "program")
@dataclass
class Program(Check):
    """Python programs that run to their end, and print what they should.

    allow: must be true; what a model wrote is executed, without network, files or further processes.  code: the key of what the
    form read that holds the program; "" for the first fenced block of the text, or all of it.  prints: what its last line must
    be, the row's `answer` or one of the data's `reference`s, without case, punctuation and white space; "" for anything.
    seconds, memory_mb, output_bytes: its limits.
    """

    allow: bool = False
    code: str = ""
    prints: Literal["", "answer", "reference"] = "answer"
    seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    memory_mb: Annotated[int, Field(ge=64, le=2**16)] = 256
    output_bytes: Annotated[int, Field(ge=1024, le=2**24)] = 65536

    def prepare(self, around: Surroundings) -> None:
        may_run("program", self.allow)

    def refuse(self, one: Candidate) -> str | None:
        source = program_in(one, self.code)
        if source is None:
            return "no program"
        ended, why = run_within(self, source)
        lines = ended.output.strip().splitlines()
        one.notes["program"] = {"code": ended.code, "printed": lines[-1][:200] if lines else ""}
        if why:
            return why
        wanted = {"": None, "answer": [one.row["answer"]], "reference": one.question.references}[self.prints]
        said = folded(lines[-1]) if lines else ""
        return None if wanted is None or said in map(folded, wanted) else "prints something else"


def may_run(check: str, allow: bool) -> None:
    """Raises DataError where a check that executes programs is not allowed to, or has no sandbox."""
    if not allow:
        raise DataError(f"checks: {check} executes what a model wrote, in a sandbox; `{check}: {{allow: true}}` allows it")
    if why := sandbox_refusal():
        raise DataError(f"checks: {check}: {why}")


class Limited(Protocol):
    """A check with the limits of a program."""

    seconds: float
    memory_mb: int
    output_bytes: int


def run_within(check: Limited, source: str) -> tuple[Ended, str | None]:
    """How a program ended within the limits of a check, and why that is no answer; None where it ran to its end."""
    ended = run_program(source, Limits(check.seconds, check.memory_mb * 2**20, check.output_bytes))
    if ended.late or ended.cut:
        return ended, "runs too long" if ended.late else "prints too much"
    return ended, "does not run" if ended.code else None


def program_in(one: Candidate, code: str) -> str | None:
    """The program of an answer: what the form read under the key `code`; for "" its first fenced block, or all of it."""
    if code:
        found = one.written.get(code) if isinstance(one.written, dict) else None
        return found if isinstance(found, str) and found.strip() else None
    block = _FENCED.search(one.text)
    found = block[1] if block else one.text
    return found if found.strip() else None

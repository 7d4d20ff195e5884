"""The check that runs programs: off unless it is allowed, and what it keeps and drops."""

import pytest

from mmkd.base.sandbox import sandbox_refusal
from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.writing.checks import Candidate, CheckSpec, Surroundings
from mmkd.writing.checks import program as module

needs_one = pytest.mark.skipif(bool(sandbox_refusal()), reason="no sandbox can be made here")


def one(text, answer="42", written=None, references=("42",)):
    about = Question("q", "how many?", answer="42", references=references)
    return Candidate("q", about, "teacher", 0, text, written, {"question": "how many?", "answer": answer}, ())


def made(**options):
    check = CheckSpec(kind="program", **options).made()
    check.prepare(Surroundings())
    return check


def test_it_is_off_unless_it_is_allowed():
    with pytest.raises(DataError, match=r"`program: \{allow: true\}` allows it"):
        made()


def test_without_a_sandbox_the_stage_does_not_begin(monkeypatch):
    monkeypatch.setattr(module, "sandbox_refusal", lambda: "no sandbox can be made here")
    with pytest.raises(DataError, match="checks: program: no sandbox can be made here"):
        made(allow=True)


@needs_one
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Let us count.\n```python\nprint('so:')\nprint(6 * 7)\n```\nDone.", None),
        ("print('42.')", None),
        ("```\nprint(41)\n```", "prints something else"),
        ("```python\nprint(6 * 7\n```", "does not run"),
        ("I think it is 42", "does not run"),
        ("```python\nx = 42\n```", "prints something else"),
        ("```python\n\n```", "no program"),
        ("import sys\nprint(42)\nsys.exit(1)", "does not run"),
        ("while True: pass", "runs too long"),
        ("while True: print('x' * 999)", "prints too much"),
        ("import urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:80').read())", "does not run"),
        ("print(open('/etc/hostname').read())", "does not run"),
    ],
)
def test_programs(text, reason):
    candidate = one(text)
    assert made(allow=True, seconds=0.5, output_bytes=16384).refuse(candidate) == reason
    assert reason == "no program" or set(candidate.notes["program"]) == {"code", "printed"}


@needs_one
def test_what_it_compares_with_and_where_the_program_stands():
    assert made(allow=True, prints="reference").refuse(one("print('B')", answer="a", references=("x", "b"))) is None
    assert made(allow=True, prints="").refuse(one("print('anything')")) is None
    check = made(allow=True, code="program")
    assert check.refuse(one("{...}", written={"program": "print(40 + 2)"})) is None
    assert check.refuse(one("{...}", written={"other": "print(42)"})) == "no program"
    assert check.refuse(one("print(42)", written="x")) == "no program"

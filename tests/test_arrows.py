"""The order of the house: each folder imports only what stands before it, no files import in a circle, nothing is too long.

Imports inside functions and under TYPE_CHECKING count, too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmkd"
# Each line may import the lines above it, and its own.
ORDER = (
    ("errors", "registry"), ("base",), ("losses",), ("towers",), ("data",), ("engine",), ("teachers",), ("terms",), ("answers",),
    ("writing",), ("train",), ("recipes",), ("evaluation",), ("retrieval",), ("runs",), ("cli",), ("sample", "testing"),
)  # fmt: skip
PLACE = {name: number for number, line in enumerate(ORDER) for name in line}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mmkd":
            assert node.level == 0
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {whole if whole in FILES else node.module for whole in names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{name} line {node.lineno}: relative import")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "mmkd"}
    return found - {name}


IMPORTS = {name: imports_of(name) for name in FILES}


def folder(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def test_imports_are_seen_wherever_they_stand(tmp_path, monkeypatch):
    text = "if TYPE_CHECKING:\n    import mmkd.runs.run\ndef f():\n    from mmkd.cli import main\n"
    (tmp_path / "x.py").write_text(text)
    monkeypatch.setitem(FILES, "mmkd.x", tmp_path / "x.py")
    assert imports_of("mmkd.x") == {"mmkd.runs.run", "mmkd.cli"}


def test_every_folder_has_its_place():
    assert {folder(name) for name in FILES} - {None} <= set(PLACE)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py", "registry.py"}


def test_no_arrow_goes_down():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items() if folder(name) is not None
        for other in sorted(others) if folder(other) is not None and PLACE[folder(other)] > PLACE[folder(name)]
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    state: dict[str, int] = {}
    circles: list[str] = []

    def visit(name: str, path: list[str]) -> None:
        state[name] = 1
        for other in sorted(IMPORTS.get(name, ())):
            if state.get(other) == 1:
                circles.append(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state and other in FILES:
                visit(other, [*path, other])
        state[name] = 2

    for name in FILES:
        if name not in state:
            visit(name, [name])
    assert not circles, "\n".join(circles)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_too_long(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION]


def test_no_file_outside_terms_compares_a_kind_with_a_word():
    wrong = []
    for name, path in FILES.items():
        if folder(name) == "terms":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                of_term = any(isinstance(s, ast.Attribute) and s.attr == "kind" for s in sides)
                word = any(isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides)
                owners = [ast.unparse(s.value) for s in sides if isinstance(s, ast.Attribute) and s.attr == "kind"]
                term = any("term" in owner.lower() for owner in owners)
                if of_term and word and term:
                    wrong.append(f"{name} line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_no_file_outside_teachers_asks_for_a_teachers_class():
    wrong = []
    for name, path in FILES.items():
        if folder(name) == "teachers":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and "Teacher" in ast.unparse(node.args[1]):
                wrong.append(f"{name} line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)

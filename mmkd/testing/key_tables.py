"""The page `docs/keys.md`, every key of a recipe, from the schema: `python -m mmkd.testing.key_tables` writes it.

What a key means is the comment beside it in the schema, or above it, or what its class's docstring says of its name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmkd.recipes.hints import inner_model
from mmkd.recipes.recipe import Recipe
from mmkd.registry import options_of, registry
from mmkd.terms.spec import options_of_term

TARGET = Path(__file__).resolve().parents[2] / "docs" / "keys.md"
NAMES = {"stages": "STAGE", "teachers": "NAME", "controls": "NAME", "terms": "TERM", "control_terms": "TERM"}
PLACES = {"writes": "stages.WRITE"}  # what a recipe writes at another place than the schema has it
SAME = {"teachers.NAME": "teacher", "stages.STAGE.control_terms.TERM": "stages.STAGE.terms.TERM",
        "stages.WRITE.data.0": "stages.STAGE.data.0", "stages.STAGE.monitor.data.0": "stages.STAGE.data.0"}  # described once
WHOLE = tuple(f"stages.WRITE.{key}" for key in ("prompt", "form", "checks.0", "row"))  # keys of cards: docs/write.md
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "min_length": "at least {} entries", "pattern": "`{}`"}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", NoneType: "null", Any: "anything"}

HEAD = """\
# Every key of a recipe

A recipe is one YAML file; [distil.md](distil.md) says how it is used. Overrides on the command line take the same names
with dots, `stages.answer.optimiser.learning_rate=1e-4`, and numbers index lists, `stages.answer.data.0.limit=500`. STAGE, WRITE
(a stage of `kind: write`, [write.md](write.md)), TERM and NAME are names of your own. A key that is left out has its default;
"—" means that it has none, must be given, or that another key takes its place. Recipes of kind `ranking`, `matching` and
`ablation` have keys of their own ([methods/cprd.md](methods/cprd.md), [distil.md](distil.md)).

"""
FOOT = "\nThis page is written by `python -m mmkd.testing.key_tables`; edit the comments of the schema, not the page.\n"


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, what it takes, its default, between which bounds, and what it means."""

    name: str
    kind: str
    default: str
    bounds: str
    meaning: str


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Key]:
    """All keys below a model of the schema, those of models inside it behind their own."""
    for name, field in model.model_fields.items():
        if field.exclude:  # a run's own
            continue
        where = f"{prefix}{field.alias or name}" if name not in PLACES else f"{prefix}{PLACES[name]}"
        kind = words_of(field.annotation)
        yield Key(where, kind, default_of(field), bounds_of(field), meaning_of(model, name))
        inner = inner_model(field.annotation)
        if inner is None:
            continue
        below = f"{where}.{NAMES[name]}" if name in NAMES and holds(field.annotation, dict) else where
        below += ".0" if holds(field.annotation, list) else ""
        if below not in SAME and below not in WHOLE:
            yield from keys(inner, f"{below}.")


def holds(annotation: Any, kind: type) -> bool:
    """Whether an annotation is a mapping or a list, or allows one."""
    return get_origin(annotation) is kind or any(holds(a, kind) for a in get_args(annotation))


def words_of(annotation: Any) -> str:
    """What a key takes, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(words_of(a) for a in inside if a is not NoneType))
    if origin is list:
        return f"list of {words_of(inside[0])}"
    if origin is tuple:
        return f"{len(inside)} of {words_of(inside[0])}"
    if origin is dict:
        return "keys" if inner_model(inside[1]) or inside[1] is Any else f"names: {words_of(inside[1])}"
    if hasattr(annotation, "__metadata__"):
        return words_of(inside[0])
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "keys"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_of(field: FieldInfo) -> str:
    """A key's default for the table."""
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value is None:
        return "—"
    if isinstance(value, BaseModel):
        return "its keys' own"
    if isinstance(value, dict) and any(isinstance(one, BaseModel) for one in value.values()):
        return f"`{list(value)}`".replace("'", "")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    text = f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`".replace("'", "")


def bounds_of(field: FieldInfo) -> str:
    """Between which values a key's may be."""
    found = [
        text.format(_number(getattr(item, name))) for item in field.metadata for name, text in BOUNDS.items()
        if getattr(item, name, None) is not None
    ]  # fmt: skip
    return ", ".join(found)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- meanings --------------------------------------------------------------------------------------------------------


def meaning_of(model: type[BaseModel], name: str) -> str:
    """What a key means; "" where the schema says nothing of it."""
    owner = next(cls for cls in model.__mro__ if name in getattr(cls, "__annotations__", {}))
    said = commented(owner).get(name) or _of_docstring(owner, name)
    return said[:1].upper() + said[1:] if not said.startswith(("`", '"')) else said


@lru_cache
def commented(model: type) -> dict[str, str]:
    """{field: the comment beside it, else above it} of a class."""
    lines = inspect.getsource(model).splitlines()
    tree = ast.parse("\n".join(lines) if not lines[0].startswith(" ") else inspect.cleandoc("\n".join(lines)))
    found = {}
    for node in tree.body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = _comment(lines[node.end_lineno - 1][node.end_col_offset :])
            above = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, _comment(line))
            found[node.target.id] = beside or " ".join(above)
    return found


def _comment(text: str) -> str:
    marks = [part.strip() for part in text.split("#")[1:]]
    return " ".join(part for part in marks if part and not re.match(r"(type:|noqa|fmt:)", part))


def _of_docstring(model: type, name: str) -> str:
    text = " ".join((model.__doc__ or "").split())
    found = re.search(rf"(?:^|[.;] ){re.escape(name)}: (.+?)(?=[.;]? \w+: |$)", text)
    return found[1].rstrip(".;") if found else ""


# ---- the page --------------------------------------------------------------------------------------------------------


def page() -> str:
    """The whole of `docs/keys.md`."""
    groups: dict[str, list[Key]] = {}
    for key in keys():
        groups.setdefault(_group(key.name), []).append(key)
    parts = [HEAD]
    for title, found in groups.items():
        parts.append(f"## {title}\n\n| key | takes | default | bounds | meaning |\n|---|---|---|---|---|\n")
        parts += [_row(key) for key in found] + ["\n"]
    parts.append(_options("terms", "Options of terms", "Beside `kind`, `weight` and the like, by the term's kind."))
    parts.append(_options("samplers", "Options of samplers", "Beside `kind`, of a stage's `sampler`."))
    return "".join(parts).rstrip("\n") + "\n" + FOOT


def _group(name: str) -> str:
    of_stages = ("stages.STAGE.data.0", "stages.STAGE.terms.TERM", "stages.STAGE.optimiser", "stages.STAGE", "stages.WRITE")
    for head in (*of_stages, "rounds", "teacher", "student", "controls", "evaluation", "guards"):
        if name.startswith(f"{head}."):
            return f"`{head}`"
    return "The recipe itself"


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.kind, key.default, key.bounds, key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _options(kind: str, title: str, text: str) -> str:
    """A table of the options of what is registered under a kind."""
    rows = []
    for name in registry(kind).names():
        about = registry(kind).about(name)
        found = registry(kind).get(name)
        if not found.__module__.startswith("mmkd."):
            continue
        known = options_of_term(found) if kind == "terms" else dict.fromkeys(options_of(found))
        if known:
            rows.append(f"| `{name}` | {', '.join(f'`{option}`' for option in about.options)} |\n")
    return f"## {title}\n\n{text}\n\n| kind | options |\n|---|---|\n{''.join(rows)}\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")

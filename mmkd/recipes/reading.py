"""Reads a recipe: what it extends, overrides, environment variables, imports, then every error at once.

Experiments are overrides on the command line (`stages.sft.terms.kl.weight=2`), not copies of the file.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mmkd.base.cards import SUFFIXES
from mmkd.base.schema import is_number
from mmkd.base.yaml_files import parse, read_mapping
from mmkd.errors import RecipeError, did_you_mean, one_line, shown
from mmkd.recipes.hints import inner_model, key_hint
from mmkd.recipes.recipe import Recipe
from mmkd.recipes.starter import is_pair, pair_recipe, shipped
from mmkd.registry import import_modules

logger = logging.getLogger(__name__)

PATHS = ("model", "source", "cache", "root", "data_root", "answers", "chat_template")  # keys whose values may be paths

Model = TypeVar("Model", bound=BaseModel)
SHOWN = 16  # errors that a message lists


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe at `path` with `key=value` overrides. Raises RecipeError with every error at once."""
    path = found_recipe(path)
    raw = read_raw(path, overrides)
    if "kind" in raw:
        what, command = ("a grid of runs", "distill") if raw["kind"] == "ablation" else ("for dual encoders", "rank")
        raise RecipeError(f"{path} is a recipe of kind {raw['kind']!r}, {what}; run it with: mmkd {command} {path}")
    return validate(with_found_paths(raw, Path(path)), str(path), Recipe)


def read_raw(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The keys and values of a recipe with what it extends, overrides and environment variables. Raises RecipeError."""
    overrides = list(overrides or [])
    if is_pair(path):
        raw, overrides = pair_recipe(path, overrides)
    else:
        path = found_recipe(path)
        raw = read_mapping(Path(path), "recipe", RecipeError)
    if "extends" in raw:
        parent = Path(path).parent / str(raw.pop("extends"))
        base = read_mapping(parent, "recipe", RecipeError)
        if "extends" in base:
            raise RecipeError(f"{parent} extends another recipe; `extends` goes one level deep")
        raw = _merge(base, raw)
    for override in overrides:
        _apply(raw, override)
    return _expand(raw, str(path))


def found_recipe(path: str | Path) -> str | Path:
    """The path itself, or that of a recipe that mmkd brings where a name of these stands in its place (`quickstart`)."""
    if is_pair(path) or Path(path).exists():
        return path
    return shipped(str(path)) or path


def with_found_paths(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe whose relative paths of models and data are looked for where the command was given, then beside the recipe, then
    in the folders above it up to its project's root (which holds .git or pyproject.toml, or is mmkd's own folder of cards). What
    is found elsewhere is logged.
    """
    above = [path.absolute().parent, *path.absolute().parent.parents]
    root = next((n for n, folder in enumerate(above) if folder.name == "_cards" or _is_root(folder)), 0)
    folders = above[: root + 1]

    def found(value: str, where: str) -> str:
        prefix, colon, name = value.rpartition(":")
        if (colon and prefix != "local-dir") or not name or os.path.isabs(os.path.expanduser(name)) or os.path.exists(name):
            return value
        there = next((folder / name for folder in folders if os.path.exists(folder / name)), None)
        if there is None:
            return value
        logger.info("%s: there is no %s here, so %s is taken", where, name, there)
        return f"{prefix}{colon}{there}"

    def walk(value: Any, where: str, key: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{where}.{k}".lstrip("."), str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{where}.{n}", key) for n, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        is_path = key in PATHS or (key in ("prompt", "benchmarks") and value.endswith(SUFFIXES))
        return found(value, where) if is_path else value

    return walk(raw, "", "")


def _is_root(folder: Path) -> bool:
    return any((folder / name).exists() for name in (".git", "pyproject.toml"))


def _merge(base: Any, top: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        changed = {k: _weighted(base[k], v, key) if k in base else v for k, v in top.items()}
        merged = {**base, **{k: _merge(base[k], v, k) if k in base else v for k, v in changed.items()}}
        return {k: v for k, v in merged.items() if v is not None} if key == "stages" else merged  # null takes a stage out
    return top


def _weighted(old: Any, new: Any, parent: str) -> Any:
    """A number in the place of a term written out is its new weight, not a new term."""
    is_term = parent in ("terms", "control_terms") and isinstance(old, dict)
    return {**old, "weight": new} if is_term and is_number(new) else new


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one dotted key; numbers index lists."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key != key.strip() or text.startswith("="):
        raise RecipeError(f"override {override!r} is not key=value, for example seed=1")
    try:
        value = parse(text)
    except ValueError as error:
        raise RecipeError(f"the value of override {one_line(override, 100)!r} is not YAML: {one_line(error)}") from error
    *path, last = key.split(".")
    place: Any = raw
    for step in path:
        if isinstance(place, list):
            place = place[_index(step, place, override)]
            continue
        if not isinstance(place, dict):
            break
        if not isinstance(place.get(step), dict | list):
            place[step] = {"weight": place[step]} if is_number(place.get(step)) else {}
        place = place[step]
    if isinstance(place, list):
        place[_index(last, place, override)] = value
    elif isinstance(place, dict):
        place[last] = _weighted(place.get(last), value, path[-1] if path else "")
    else:
        raise RecipeError(f"override {override!r} goes into {place!r}, which holds no keys")


def _index(step: str, place: list, override: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise RecipeError(f"override {override!r}: {step!r} is no index of a list of {len(place)}")
    return int(step)


def _expand(value: Any, where: str = "") -> Any:
    """Environment variables in strings: ${NAME} and ${NAME:-default}. Raises RecipeError that lists all that are not set."""
    missing: list[str] = []

    def replace(text: str, path: str) -> str:
        def found(match: re.Match) -> str:
            name, default = match["name"], match["default"]
            if name not in os.environ and default is None:
                missing.append(f"  {path}: the environment variable {name} is not set; set it or write ${{{name}:-default}}")
            return os.environ.get(name, default or "")

        return _VARIABLE.sub(found, text)

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{path}.{i}") for i, v in enumerate(value)]
        return replace(value, path) if isinstance(value, str) else value

    expanded = walk(value, "")
    if missing:
        told = missing[:SHOWN] + ([f"  and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else [])
        raise RecipeError(f"{where} has {_errors(len(missing))}:\n" + "\n".join(told))
    return expanded


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^}]*))?\}")


def _errors(count: int) -> str:
    return f"{count} error{'s' * (count > 1)}"


def validate(raw: dict[str, Any], where: str, model: type[Model]) -> Model:
    """`raw` as an instance of a recipe's model, after the modules that it imports. Raises RecipeError that lists every error."""
    import_named(raw, where)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [one_line(_explain(e, model, raw), 700) for e in found[:SHOWN]]
        lines += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise RecipeError(f"{where} has {_errors(len(found))}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def import_named(raw: dict[str, Any], where: str) -> None:
    """Imports the modules of the key `imports`, also looked for beside the recipe. Raises RegistryError."""
    names = raw.get("imports", [])
    if isinstance(names, list) and all(isinstance(name, str) for name in names):  # else validation says what is wrong
        import_modules(names, [Path(where).parent] if Path(where).is_file() else [])


def _explain(error: dict[str, Any], model: type[BaseModel], raw: dict[str, Any]) -> str:
    path = one_line(".".join(str(p) for p in error["loc"]), 200)
    path = path.replace("writes.", "stages.", 1) if path.startswith("writes.") else path  # where the user wrote it
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {key_hint(str(error['loc'][-1]), _model_at(error['loc'][:-1], model), model)}"
    if kind == "missing":
        return f"{path}: missing{_other_stage(error['loc'], raw)}"
    if kind == "invalid_key":
        return (
            f"{path}: the key {shown(error['input'])} is not text; YAML reads on, off, yes and no as true and false "
            "(the field of a term is called `positions`)"
        )
    message = error["msg"].removeprefix("Value error, ")
    given = "" if kind == "value_error" else f" (given: {shown(error['input'])})"
    return f"{path or 'recipe'}: {message}{given}"


def _model_at(loc: tuple, model: Any) -> Any:
    """The model whose keys stand at a place of the recipe, for suggestions."""
    for step in loc:
        field = model.model_fields.get(str(step))
        if field is not None:
            model = inner_model(field.annotation) or model
        # a step that is no field is a name or an index inside a dict or list of models: the model stays
    return model


def _other_stage(loc: tuple, raw: dict[str, Any]) -> str:
    """Of a stage without data, as a misspelt override makes one, the stages that have some."""
    stages = raw.get("stages")
    if len(loc) != 3 or loc[0] != "stages" or loc[2] != "data" or not isinstance(stages, dict):
        return ""
    whole = [name for name, stage in stages.items() if isinstance(stage, dict) and "data" in stage]
    return f"; if no new stage is meant, {did_you_mean(str(loc[1]), whole)}" if whole else ""

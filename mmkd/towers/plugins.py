"""Registered encoders and projectors by name, for students that are assembled or loaded."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmkd.errors import TowerError, did_you_mean
from mmkd.registry import registry


def find(kind: str, name: str, module: str | None = None) -> Any:
    """What is registered as `name` of a kind; `module` is imported when nothing is.

    Raises TowerError for a name that is not known, or a module that cannot be imported.
    """
    known, what = registry(kind), kind.removesuffix("s")
    if name not in known and module:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise TowerError(f"the module {module!r} of the {what} {name!r} cannot be imported: {error}") from error
    if name not in known:
        hint = did_you_mean(name, known.names())
        raise TowerError(
            f"no {what} is registered as {name!r}; {hint if hint.endswith('?') else hint + '.'} Import the module that registers "
            "it, or give `module`"
        )
    return known.get(name)

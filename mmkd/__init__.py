"""mmkd distils a large vision-language model into a tiny one.

What the commands do can be called from Python, see docs/python.md:

    load_recipe(path, overrides)     a recipe, checked
    distill(recipe)                  runs it, to models, summary and report
    evaluate(model, benchmarks)      scores a model
    compare(folders)                 compares models on the same questions
    Tower                            a vision-language model as teacher or student
    losses                           the loss functions
    register(kind, name)             adds a term, format, metric, ... of your own

Each is imported when it is asked for, so that `import mmkd` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "load_recipe": "mmkd.recipes.reading",
    "distill": "mmkd.runs.run",
    "evaluate": "mmkd.runs.evaluate",
    "compare": "mmkd.evaluation.compare",
    "Tower": "mmkd.towers.tower",
    "register": "mmkd.registry",
}

__all__ = ["__version__", "losses", *_PLACES]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("mmkd.losses")
    if name not in _PLACES:
        raise AttributeError(f"module 'mmkd' has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

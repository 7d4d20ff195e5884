"""One registry for everything that can be plugged in: terms, formats, metrics, parsers, encoders, projectors, samplers, teachers,
checks and forms of written answers.

    @register("terms", "my_term")
    class MyTerm: ...

What mmkd itself brings is registered in the modules of one package a kind, which are imported when the kind is first asked for:
a new file there needs no other change. Installed packages bring theirs by entry points of the group `mmkd.KIND`, which are loaded
when their name is asked for. A user's own module is named in a recipe (`imports: [my_module]`) and imported before the recipe is
validated.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from mmkd.errors import RegistryError, did_you_mean

Registered = TypeVar("Registered")

# Kind -> the package whose modules register what mmkd brings.
PACKAGES = {
    "terms": "mmkd.terms",
    "teachers": "mmkd.teachers",
    "formats": "mmkd.data.formats",
    "samplers": "mmkd.data.samplers",
    "answers": "mmkd.answers",
    "forms": "mmkd.writing.forms",
    "checks": "mmkd.writing.checks",
    "encoders": "mmkd.towers.encoders",
    "projectors": "mmkd.towers.projectors",
    "metrics": "mmkd.evaluation.tasks",
    "parsers": "mmkd.evaluation.tasks",
}


@dataclass(frozen=True)
class About:
    """What `mmkd list KIND` prints of a registered object."""

    name: str
    source: str  # module:object
    summary: str  # first line of its docstring
    options: tuple[str, ...]


class Registry:
    """Objects of one kind by name."""

    def __init__(self, kind: str, package: str | None = None):
        self.kind, self._package = kind, package
        self._objects: dict[str, Any] = {}
        self._lazy: dict[str, str | EntryPoint] = {}  # "module:object", imported when asked for
        self._scanned = package is None

    def add(self, name: str, value: Any) -> None:
        """Registers an object, or where it is to be found: "module:object". Raises RegistryError for a name of something else."""
        there = self._objects.get(name, self._lazy.get(name))
        if there is not None and _source(there) != _source(value):
            raise RegistryError(
                f"{self.kind[:-1]} {name!r} of {_source(value)} is registered already, by {_source(there)}; take another name"
            )
        (self._lazy if isinstance(value, str | EntryPoint) else self._objects)[name] = value

    def get(self, name: str) -> Any:
        """The object of this name. Raises RegistryError, with a suggestion, for one that is not known."""
        self._scan()
        if name not in self._objects:
            if name not in self._lazy:
                raise RegistryError(f"there is no {self.kind[:-1]} {name!r}; {did_you_mean(name, self.names())}")
            self._objects[name] = self._load(name, self._lazy[name])
        return self._objects[name]

    def _load(self, name: str, lazy: str | EntryPoint) -> Any:
        try:
            if isinstance(lazy, EntryPoint):
                return lazy.load()
            module, _, attribute = lazy.partition(":")
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"{self.kind[:-1]} {name!r} cannot be loaded from {_source(lazy)}: {error}") from error

    def names(self) -> list[str]:
        self._scan()
        return sorted({*self._objects, *self._lazy})

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._objects or name in self._lazy

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def about(self, name: str) -> About:
        """Where an object comes from, what it is, and its options. Raises RegistryError."""
        found = self.get(name)
        summary = (inspect.getdoc(found) or "").partition("\n")[0]
        return About(name, _source(self._lazy.get(name, found)), summary, options_of(found))

    def remove(self, name: str) -> None:
        """Forgets a name; for tests."""
        self._objects.pop(name, None)
        self._lazy.pop(name, None)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=f"mmkd.{self.kind}"):
            self.add(entry.name, entry)


_REGISTRIES: dict[str, Registry] = {kind: Registry(kind, package) for kind, package in PACKAGES.items()}


def registry(kind: str) -> Registry:
    """The registry of a kind. Raises RegistryError for a kind that there is not."""
    if kind not in _REGISTRIES:
        raise RegistryError(f"nothing of kind {kind!r} can be registered; {did_you_mean(kind, _REGISTRIES)}")
    return _REGISTRIES[kind]


def register(kind: str, name: str) -> Callable[[Registered], Registered]:
    """A decorator that registers a class or function under a name. Raises RegistryError (see `Registry.add`)."""
    found = registry(kind)

    def keep(value: Registered) -> Registered:
        found.add(name, value)
        return value

    return keep


def options_of(found: Any) -> tuple[str, ...]:
    """What a recipe may set of an object: its own `options`, else the keyword arguments that have a default."""
    stated = getattr(found, "options", None)
    if stated is not None and not callable(stated) and not isinstance(stated, property):
        return tuple(stated)
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return ()
    hidden = getattr(found, "not_options", ())
    return tuple(p.name for p in parameters if p.default is not inspect.Parameter.empty and p.name not in hidden)


def import_modules(names: Iterable[str], folders: Sequence[Path] = ()) -> None:
    """Imports a user's modules, which register what they bring. They are looked for on Python's path, in the current folder
    and in `folders`. Raises RegistryError with every module that cannot be imported."""
    wrong = []
    with _also_on_path([Path.cwd(), *folders]):
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                wrong.append(f"  {name}: {error}")
    if wrong:
        raise RegistryError(
            "imports: these modules cannot be imported; install them or put their folder on PYTHONPATH\n" + "\n".join(wrong)
        )


@contextmanager
def _also_on_path(folders: Sequence[Path]) -> Iterator[None]:
    """Behind everything else on the path, so that no file of a user hides an installed package."""
    new = [str(folder.resolve()) for folder in folders if str(folder.resolve()) not in sys.path]
    sys.path.extend(new)
    try:
        yield
    finally:
        for folder in new:
            if folder in sys.path:
                sys.path.remove(folder)


def _source(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, EntryPoint):
        return value.value
    return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', repr(value))}"

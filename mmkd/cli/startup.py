"""How commands start sooner: for their own imports, and no library function's."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# transformers' trainer imports them wherever they are installed (bitsandbytes through peft), also for runs that use neither
# quantised models nor data sets of theirs.
LATE = ("bitsandbytes", "datasets")


@contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a command: without garbage collection, and the packages of `LATE` wait for their first use.

    Imports make millions of objects that stay until the process ends. The collector would walk them again and again meanwhile,
    and is told not to look at them afterwards.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with late(*LATE):
            yield
        if len(sys.modules) > before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # what is left then tells how many objects leaked; these did not
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def late(*names: str) -> Iterator[None]:
    """Packages of these names that are first imported within run when something of them is first used, within or later.

    Whoever imported one has the package itself. `importlib.util.LazyLoader` does less: its packages run as soon as they are
    imported a second time.
    """
    finder = _LateFinder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _LateFinder:
    def __init__(self, names: Sequence[str]):
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self.names else None
        if spec is None or spec.loader is None or spec.submodule_search_locations is None:
            return None
        spec.loader = _LateLoader(spec.loader)
        return spec


class _LateLoader(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        del module.__path__  # the import of a submodule asks for it, and so runs the package first
        module.__class__ = _LateModule


class _LateModule(ModuleType):
    """A package that has not run yet. It does when it is asked for anything that the import system has not set."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        self.__class__ = ModuleType
        self.__path__ = spec.submodule_search_locations
        self.__loader__ = spec.loader = spec.loader.loader
        spec.loader.exec_module(self)
        return getattr(self, name)

"""What makes commands start soon: imports and reading without the garbage collector, packages that wait for their use."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# transformers' trainer imports them wherever they are installed, also for runs that use neither quantised models (bitsandbytes
# builds its kernels with torch's compiler at import) nor data sets of theirs (which import pandas and pyarrow).
LATE = ("bitsandbytes", "datasets")


@contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a command: without the garbage collector, and without the packages of `LATE`.

    What was imported stays until the process ends, so the collector is told not to look at it again before.
    """
    before = len(sys.modules)
    with uncollected(), late(*LATE):
        yield
        if len(sys.modules) > before:
            gc.freeze()
            atexit.register(gc.unfreeze)  # what is left then tells how many objects leaked; these did not


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within. For imports and reading, which make many objects that stay: it would walk all of them, again
    and again, which takes longer than to make them. As a decorator: for the time of each call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def list_models_once() -> None:
    """Imports `transformers.models` with the list of names that `transformers` itself made of the same files.

    Each reads all model files otherwise: the library remembers an answer by the words of the question, and they ask in different
    ones. One without this function goes its ordinary way.
    """
    if "transformers.models" in sys.modules:
        return
    import transformers.utils.import_utils as asked

    read = getattr(asked, "create_import_structure_from_path", None)
    if read is None:
        return

    def remembered(path: Any, *more: Any, **named: Any) -> Any:
        return read(Path(path).parent if Path(path).name == "__init__.py" else path, *more, **named)

    asked.create_import_structure_from_path = remembered
    try:
        import_module("transformers.models")
    finally:
        asked.create_import_structure_from_path = read


@contextmanager
def late(*names: str) -> Iterator[None]:
    """Whoever imports these packages within gets a stand-in, which imports the package when something of it is asked for.

    Afterwards they are imported as ever. Packages that are imported already, or not installed, are left alone.
    """
    specs = {name: find_spec(name) for name in names if name not in sys.modules}
    there = {name: _StandIn(name, spec) for name, spec in specs.items() if spec is not None}
    sys.modules.update(there)
    try:
        yield
    finally:
        for stand_in in there.values():
            stand_in.leave()


class _StandIn(ModuleType):
    """A package that is not imported yet. It has what tells that it is installed; all else comes from the package itself."""

    def __init__(self, name: str, spec: Any):
        super().__init__(name)
        self.__spec__, self.__file__ = spec, spec.origin

    def leave(self) -> None:
        """Makes way for the package itself, where that has not happened yet."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        self.leave()
        return getattr(import_module(self.__name__), name)

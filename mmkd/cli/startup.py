"""How commands import what is heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmkd.base.startup import list_models_once, quick_imports

__all__ = ["model_imports", "quick_imports"]


@contextmanager
def model_imports() -> Iterator[None]:
    """For imports of what loads models."""
    with quick_imports():
        list_models_once()
        yield

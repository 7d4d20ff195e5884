"""A batch on disk: its tensors as safetensors, all else as JSON. Nothing is pickled, and only listed classes are made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.base.files import write_whole
from mmkd.errors import DataError
from mmkd.teachers.store import StoredRows
from mmkd.towers.tower import TowerInputs
from mmkd.train.batch import Batch, TeacherBatch
from mmkd.train.preference import PreferenceBatch

# A part of the package that has batches of its own adds their classes.
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Batch, PreferenceBatch, TeacherBatch, TowerInputs, StoredRows)}
LEFT_OUT = ("host", "ahead")  # what is made from the rest


def save_batch(batch: Any, path: Path) -> None:
    """Writes path.safetensors and path.json."""
    tensors: dict[str, Tensor] = {}
    content = _taken_apart(batch, tensors, {})
    save_file(tensors, path.with_suffix(".safetensors"))
    write_whole(path.with_suffix(".json"), json.dumps(content) + "\n")


def load_batch(path: Path, kind: type = Batch) -> Any:
    """The batch of a kind that `save_batch` wrote. Raises DataError."""
    try:
        tensors = load_file(path.with_suffix(".safetensors"))
        batch = _put_together(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), tensors, {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DataError(f"{path}: no batch in it can be read ({type(error).__name__}: {error}); run the recipe again") from error
    if not isinstance(batch, kind):
        raise DataError(f"{path} holds no batch; run the recipe again")
    return batch


def _taken_apart(value: Any, tensors: dict[str, Tensor], known: dict[int, int]) -> Any:
    """JSON of a value; its tensors go into `tensors` under the names that stand in their place."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if type(value).__name__ in KINDS:
        if id(value) in known:  # student and teacher may share their inputs
            return {"same": known[id(value)]}
        known[id(value)] = len(known)
        parts = {f.name: _taken_apart(getattr(value, f.name), tensors, known) for f in fields(value) if f.name not in LEFT_OUT}
        return {"kind": type(value).__name__, "fields": parts}
    if isinstance(value, Mapping):
        return {"dict": {key: _taken_apart(inner, tensors, known) for key, inner in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_taken_apart(inner, tensors, known) for inner in value]}
    if value is None or isinstance(value, str | int | float):
        return {"value": value}
    return {"lost": type(value).__name__}  # of a teacher of one's own, say


def _put_together(content: dict[str, Any], tensors: dict[str, Tensor], known: dict[int, Any]) -> Any:
    ((form, inner),) = ((key, value) for key, value in content.items() if key != "fields")
    if form == "tensor":
        return tensors[inner]
    if form == "same":
        return known[inner]
    if form == "kind":
        number = len(known)
        known[number] = None
        parts = {name: _put_together(part, tensors, known) for name, part in content["fields"].items()}
        known[number] = KINDS[inner](**parts)
        return known[number]
    if form == "dict":
        return {key: _put_together(part, tensors, known) for key, part in inner.items()}
    if form == "list":
        return [_put_together(part, tensors, known) for part in inner]
    if form == "lost":
        raise TypeError(f"{inner} cannot be kept in a file")
    return inner

"""Prepared samples that the runs of one process share: a student, its controls, other seeds and methods read the same ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from torch.utils.data import get_worker_info

from mmkd.towers.inputs import Encoded
from mmkd.towers.samples import Sample

_T = TypeVar("_T", Encoded, tuple)


class EqualPixels:
    """Holds pixels of prepared samples, equal ones once: many questions are about one picture."""

    def __init__(self) -> None:
        self._found: dict[bytes, Tensor] = {}

    def hold(self, encoded: Encoded) -> int:
        """Puts what is held already in the place of equal pixels; returns the bytes that the sample adds."""
        added = 2 * encoded.input_ids.numel() * encoded.input_ids.element_size()
        for name, tensor in encoded.pixels.items():
            digest = hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16)
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            if digest.digest() not in self._found:
                self._found[digest.digest()] = tensor
                added += tensor.numel() * tensor.element_size()
            encoded.pixels[name] = self._found[digest.digest()]
        return added


class PreparedSamples:
    """Keeps what samples became, by their content and by all that prepared them, until so many bytes are full.

    Pictures are known by file, size and time of change, and equal pixels are kept once. A loader's processes keep nothing
    here: what they keep ends with them.
    """

    def __init__(self, limit: int = 2**30):
        self.limit, self.bytes = limit, 0
        self._found: dict[bytes, Encoded | tuple] = {}
        self._pixels = EqualPixels()

    def __deepcopy__(self, memo: dict) -> PreparedSamples:
        return self  # a copy of a tower shares it

    def __reduce__(self) -> tuple:
        return PreparedSamples, (self.limit,)  # another process begins with nothing

    def once(self, prepared_by: str, sample: Sample, what: str, make: Callable[[], _T]) -> _T:
        """The result of `make`: an Encoded, or a tuple that begins with one. `what` it is of the sample.

        prepared_by: the fingerprint of what prepares it.  An error of `make` is raised each time.
        """
        key = None if get_worker_info() is not None else _key(prepared_by, sample, what)
        if key is None:
            return make()
        if key in self._found:
            return _renamed(self._found[key], sample.id)
        made = make()
        if self.bytes < self.limit:
            self._found[key] = self._shared(made)
        return made

    def _shared(self, made: _T) -> _T:
        """The same, with pixels that are known already in place of equal ones."""
        self.bytes += self._pixels.hold(made[0] if isinstance(made, tuple) else made)
        return made


def _renamed(made: _T, name: str) -> _T:
    """For the same words and pictures under another id; `pixels` is a dict of its own."""
    if isinstance(made, tuple):
        return (_renamed(made[0], name), *made[1:])
    return replace(made, id=name, pixels=dict(made.pixels))


def _key(prepared_by: str, sample: Sample, what: str) -> bytes | None:
    """None for a sample that cannot be known by its content alone."""
    pictures = []
    for ref in sample.images:
        try:
            about = os.stat(ref.file)
        except (AttributeError, TypeError, OSError):  # it is in memory, or not there
            return None
        pictures.append([ref.key, about.st_size, about.st_mtime_ns, about.st_ino])
    text = json.dumps([prepared_by, what, sample.content, pictures])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

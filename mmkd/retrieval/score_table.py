"""A teacher's scores over the pairs of a data set, computed once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmkd.base.files import room_for
from mmkd.errors import DataError, NotFiniteError, one_line
from mmkd.retrieval.cross_encoders import CrossEncoder
from mmkd.retrieval.pairs import PairSet
from mmkd.towers.finite import not_finite

TABLE_ENTRIES = 64 * 2**20  # scores of all pairs are kept up to so many (256 MiB)


class ScoreTable:
    """A teacher's scores over the pairs of one data set: computed when they are first asked for, then kept.

    They are kept in memory and, with `folder`, in a file whose name says what they depend on: the teacher, the pictures' bytes,
    the texts. Data sets of more than TABLE_ENTRIES pairs are scored afresh each time.
    """

    def __init__(self, teacher: CrossEncoder, pairs: PairSet, folder: Path | None = None, batch_size: int = 256):
        self.teacher, self.pairs, self.batch_size = teacher, pairs, batch_size
        self.computed = 0  # pairs that the teacher has scored for this table
        shape = (len(pairs.images), len(pairs.texts))
        self._table = torch.full(shape, torch.nan) if shape[0] * shape[1] <= TABLE_ENTRIES else None
        self._path = folder / f"{self._key()}.safetensors" if folder is not None and self._table is not None else None
        if self._path is not None and self._path.exists():
            self._table = _read(self._path, shape)

    def _key(self) -> str:
        digest = hashlib.blake2b(self.teacher.fingerprint().encode(), digest_size=16)
        for ref in self.pairs.images:
            digest.update(hashlib.blake2b(ref.read_bytes(), digest_size=16).digest())
        digest.update("\0".join(self.pairs.texts).encode())
        return digest.hexdigest()

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores of pictures and texts by number, of one shape; on the CPU."""
        asked = torch.stack([images.flatten().cpu(), texts.flatten().cpu()], -1)  # [P, 2]
        if self._table is None:
            distinct, inverse = asked.unique(dim=0, return_inverse=True)
            return self._compute(distinct)[inverse].reshape(images.shape)
        missing = asked[self._table[asked[:, 0], asked[:, 1]].isnan()].unique(dim=0)
        if len(missing):
            self._table[missing[:, 0], missing[:, 1]] = self._compute(missing)
        return self._table[asked[:, 0], asked[:, 1]].reshape(images.shape)

    def all_scores(self) -> Tensor:
        """Every picture against every text. [images, texts]"""
        shape = (len(self.pairs.images), len(self.pairs.texts))
        return self.scores(*torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij"))

    def _compute(self, pairs: Tensor) -> Tensor:
        self.computed += len(pairs)
        found = self.teacher.scores(self.pairs.images, self.pairs.texts, pairs, batch_size=self.batch_size)
        if not_finite([("scores", found)]):
            raise NotFiniteError("the teacher's scores of some pairs are not finite; check its weights, or take another dtype")
        return found

    def save(self) -> None:
        """Keeps what is known so far for other runs."""
        if self._path is None or not self.computed:
            return
        self.write(self._path)

    def write(self, path: Path) -> None:
        """Writes the table; a file of that name appears whole or not at all. Raises DataError where there is no room."""
        if self._table is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with room_for(partial, self._table.nbytes):
            save_file({"scores": self._table}, partial, {"sum": _sum(self._table)})
            partial.replace(path)

    def read(self, path: Path) -> None:
        """Takes up what `write` left. Raises DataError for a file that is damaged."""
        if self._table is not None and path.exists():
            self._table = _read(path, tuple(self._table.shape))


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            named, table = (file.metadata() or {}).get("sum"), file.get_tensor("scores")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({one_line(error)}); delete it, it is computed again") from error
    if tuple(table.shape) != shape or named != _sum(table):
        raise DataError(f"{path} is damaged: it is not what was written; delete it, it is computed again")
    return table


def _sum(table: Tensor) -> str:
    return xxhash.xxh3_128(table.contiguous().numpy()).hexdigest()

"""What a teacher says on the rows of a recipe, on disk: written once, by any number of processes, and read by key.

    DIR/cache.json              what the entries depend on beside the samples: teacher's files, dtype, length, precision, rows
    DIR/teacher/                configuration, processor and (exact mode) head of the teacher; no other weights
    DIR/references/             log-probabilities of preference pairs (`mmkd.train.reference`)
    DIR/shards/*.safetensors    the entries of some samples; a shard is there whole or not at all

An entry's key is the hash of its sample's turns and of its pictures' bytes: neither its id, its place, the data set nor the
run matter. Shards are memory-mapped; of each, only the small index tensors are read when the cache is opened. A shard's name is
the hash of its header and its index, which holds a hash of every entry: all is checked, each part when it is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmkd.base.checksums import sums_in
from mmkd.base.files import room_for, sync_folder, write_whole
from mmkd.data.samples import ImageRef, Sample
from mmkd.errors import DataError, one_line
from mmkd.teachers.shard_hashes import hash_of_tensors, name_of_shard

FORMAT = 2  # 2: with hashes
# Bits of a row's kind; a row may be of several.
KINDS = {"response": 1, "prompt": 2, "visual": 4, "text": 8, "all": 16, "answer": 32}
HIDDEN = ("hidden",)  # signals of exact mode: last hidden states [N, D]
TOP_K = ("ids", "log_probs", "tail")  # of top-k mode: [N, k] int32, [N, k] float16, [N] float32
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 60.0  # what a kill may cost
OPEN_SHARDS = 256  # file handles that a process keeps
_DYING = 2.0  # seconds that a killed process may still hold its lock
_BLOCK = 8 * 2**20  # bytes that are hashed at a time
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")


# ---- keys ------------------------------------------------------------------------------------------------------------


def text_key(sample: Sample) -> bytes:
    """Hash of a sample's turns: roles, texts, and where the pictures stand. 16 bytes"""
    return hashlib.blake2b(json.dumps(sample.content).encode(), digest_size=16).digest()


def content_key(sample: Sample, pictures: dict[ImageRef, bytes] | None = None) -> bytes:
    """Hash of a sample's turns and of its pictures' bytes. 16 bytes. Raises ImageError.

    pictures: hashes of those that were read before; new ones are added.
    """
    digest = hashlib.blake2b(text_key(sample), digest_size=16)
    for image in sample.images:
        known = pictures.get(image) if pictures is not None and image.file is not None else None
        if known is None:
            known = hashlib.blake2b(image.read_bytes(), digest_size=16).digest()
            if pictures is not None and image.file is not None:
                pictures[image] = known
        digest.update(known)
    return digest.digest()


# ---- what a cache is of ----------------------------------------------------------------------------------------------


def teacher_files(model: str) -> dict[str, list] | None:
    """{file: [size, time of change in ns, hash]} of a local model folder, {"commit": [hash]} of a hub model in the local cache;
    None for one that is not here. Hashes of local files are "" until `with_hashes` reads them."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        kept = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _MODEL_FILES]
        return {p.name: [p.stat().st_size, p.stat().st_mtime_ns, ""] for p in kept}
    try:
        config = try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name that a repository can have
        return None
    return {"commit": [Path(config).parent.name]} if isinstance(config, str) else None


def with_hashes(model: str, files: dict[str, list]) -> dict[str, list]:
    """The files with the hash of each local one's content."""
    folder = Path(model).expanduser()
    return {name: about if name == "commit" else [*about[:2], _hash(folder / name)] for name, about in files.items()}


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def changed_files(model: str, recorded: dict[str, list]) -> list[str]:
    """Names of the teacher's files that are no longer those a cache was made from; [] too if the teacher is not here.

    A file of the same size and time is taken for the same; else its content decides.
    """
    present = teacher_files(model)
    if present is None:
        return []
    differing = {*present, *recorded} - {n for n in present if n in recorded and present[n][:2] == recorded[n][:2]}
    missing = {n for n in differing if n not in present or n not in recorded}
    both = {n: present[n] for n in differing - missing}
    hashed = with_hashes(model, both)
    return sorted(missing | {n for n in both if hashed[n][-1] != recorded[n][-1]})


@dataclass
class About:
    """cache.json."""

    model: str
    files: dict[str, list]
    fingerprint: str  # of the loaded teacher, as `Tower.fingerprint`
    dtype: str
    quantise: str | None
    max_length: int
    precision: str
    top_k: int | None  # None: exact mode
    rows: list[str]  # kinds of position
    features: bool  # whether vision features are kept
    logit_rule: list  # (scale, soft cap) between the teacher's head and its logits
    vocabulary: int  # columns that the log-probabilities run over
    body: dict[str, list]  # sizes and hashes of the files in teacher/
    format: int = FORMAT
    reading: dict = field(default_factory=dict)  # the teacher's keys on how it reads samples
    date: str | None = None  # what the teacher's template printed, where it prints the date

    @property
    def mode(self) -> str:
        return "exact" if self.top_k is None else f"top-{self.top_k}"

    @property
    def signals(self) -> tuple[str, ...]:
        return HIDDEN if self.top_k is None else TOP_K

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "cache.json", json.dumps({**self.__dict__, "sum": self._sum()}, indent=1) + "\n")

    def _sum(self) -> str:
        return xxhash.xxh3_128(json.dumps(self.__dict__, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def load(folder: Path) -> About:
        """Raises DataError for a folder that holds no cache of this format."""
        path = folder / "cache.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            named = content.pop("sum", None)
            about = About(**content)
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no teacher cache; write it: mmkd cache RECIPE teacher.cache={folder}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            told = one_line(error)
            raise DataError(f"{path} is damaged or of another version ({told}); delete {folder} and write it again") from error
        if about.format != FORMAT or named != about._sum():
            raise DataError(f"{path} is damaged or of another version; delete {folder} and write it again")
        return about

    def check_body(self, folder: Path) -> None:
        """Raises DataError where the files of teacher/ are not what was written."""
        there = sums_in(folder / "teacher")
        wrong = sorted(name for name, about in self.body.items() if there.get(name) != about)
        if wrong:
            raise DataError(f"{folder / 'teacher' / wrong[0]} is not what was written; delete {folder} and write it again")

    def differences(self, wanted: dict[str, Any]) -> list[str]:
        """How this cache differs from what a recipe asks for: "max_length: 256 in the cache, 512 in the recipe"."""
        found = [
            f"{name}: {getattr(self, name)} in the cache, {value} in the recipe"
            for name, value in wanted.items()
            if name != "model" and getattr(self, name) != value
        ]
        changed = changed_files(wanted["model"], self.files)
        if changed:
            found.append(f"{len(changed)} files of the teacher {wanted['model']} changed since: {', '.join(changed[:4])}")
        elif wanted["model"] != self.model and teacher_files(wanted["model"]) is None:
            found.append(f"teacher.model: {self.model} in the cache, {wanted['model']} in the recipe, whose files are not here")
        return found


# ---- entries ---------------------------------------------------------------------------------------------------------


@dataclass
class StoredRows:
    """What the teacher says on some rows of a sample or of a batch, in the order of the samples and of their tokens."""

    kinds: Tensor  # [N] uint8, bits of KINDS; on the CPU
    tokens: Tensor  # [N] int32, the token that follows each row; on the CPU
    scores: Tensor  # [N] float32, its log-probability under the teacher at response rows, else 0; on the CPU
    signal: dict[str, Tensor]  # HIDDEN or TOP_K
    images: list[int]  # visual rows of each image; [] where visual rows are not kept
    features: list[Tensor] = field(default_factory=list)  # vision features of each image [n_i, Dv], if kept
    lengths: list[int] = field(default_factory=list)  # rows of each sample of a batch

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StoredRows:
        move = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.signal.items()}
        return replace(self, signal=move, features=[f.to(device, non_blocking=non_blocking) for f in self.features])

    def pin_memory(self) -> StoredRows:
        pinned = {name: tensor.pin_memory() for name, tensor in self.signal.items()}
        return replace(self, signal=pinned, features=[f.pin_memory() for f in self.features])

    def where(self, positions: Iterable[str]) -> Tensor:
        """Rows of one of these kinds. [N] bool"""
        return (self.kinds & bits(positions)) != 0

    def at(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """The signal at the rows of these kinds, of these samples of a batch or of all, each [R, ...]."""
        where = self.where(positions)
        if samples is not None:
            where = where & torch.tensor(samples).repeat_interleave(torch.tensor(self.lengths))
        if bool(where.all()):
            return self.signal
        index = where.nonzero().squeeze(-1)
        return {n: t.index_select(0, index.to(t.device, non_blocking=True)) for n, t in self.signal.items()}

    @staticmethod
    def join(parts: Sequence[StoredRows]) -> StoredRows:
        """The rows of several samples behind one another, copied out of what they were read from."""
        names = parts[0].signal
        features = [f for p in parts for f in p.features]
        return StoredRows(
            torch.cat([p.kinds for p in parts]),
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.scores for p in parts]),
            {name: torch.cat([p.signal[name] for p in parts]) for name in names},
            [n for p in parts for n in p.images],
            list(torch.cat(features).split([len(f) for f in features])) if features else [],
            [len(p.kinds) for p in parts],
        )


def bits(positions: Iterable[str]) -> int:
    return sum(KINDS[name] for name in set(positions))


# ---- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects entries and writes them as shards; one writer a process.

    Raises DataError if another process writes with the same number.
    """

    def __init__(self, folder: Path, rank: int = 0, *, shard_bytes: int = SHARD_BYTES):
        self.folder = folder / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial = self.folder / f".rank_{rank}.partial"
        self.shard_bytes = shard_bytes
        self.rows = self.bytes = 0  # written so far
        self._entries: list[tuple[bytes, bytes, StoredRows]] = []
        self._size, self._since = 0, time.monotonic()
        self._lock = FileLock(self.folder / f".rank_{rank}.lock", thread_local=False)  # no fork of this process holds it
        try:
            self._lock.acquire(timeout=_DYING)
        except Timeout:
            raise DataError(
                f"another process writes to {self.folder} as number {rank}; give each process its RANK and all of them WORLD_SIZE"
            ) from None

    def add(self, key: bytes, text: bytes, stored: StoredRows) -> None:
        self._entries.append((key, text, stored))
        tensors = [*stored.signal.values(), *stored.features]
        self._size += sum(t.numel() * t.element_size() for t in tensors)
        if self._size >= self.shard_bytes or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected. The shard gets its name when it is whole and on the disk."""
        if self._entries:
            with room_for(self.partial, self._size):
                save_file(_packed(self._entries), self.partial)
                with self.partial.open("rb") as file:
                    os.fsync(file.fileno())
                with safe_open(self.partial, "numpy") as shard:
                    index = {name: shard.get_tensor(name) for name in _INDEX}
                self.bytes += self.partial.stat().st_size
                self.rows += sum(len(stored.kinds) for _, _, stored in self._entries)
                os.replace(self.partial, self.folder / f"{name_of_shard(self.partial, index.values())}.safetensors")
                sync_folder(self.folder)
        self._entries, self._size, self._since = [], 0, time.monotonic()

    def close(self) -> None:
        self.flush()
        self._lock.release()


def _packed(entries: Sequence[tuple[bytes, bytes, StoredRows]]) -> dict[str, Tensor]:
    """The tensors of a shard of S samples, N rows, I images."""
    joined = StoredRows.join([stored for _, _, stored in entries])
    tensors = {
        "key": _bytes([key for key, _, _ in entries]),  # [S, 16]
        "text": _bytes([text for _, text, _ in entries]),  # [S, 16]
        "rows": torch.tensor([len(stored.kinds) for _, _, stored in entries]),  # [S]
        "images": torch.tensor([len(stored.images) for _, _, stored in entries]),  # [S]
        "image_rows": torch.tensor(joined.images, dtype=torch.long),  # [I]
        "features_of": torch.tensor([len(stored.features) for _, _, stored in entries]),  # [S]
        "feature_rows": torch.tensor([len(f) for f in joined.features], dtype=torch.long),  # [F]
        "sums": _bytes([_sums(stored, list(stored.signal)) for _, _, stored in entries]),  # [S, 16]
        "kinds": joined.kinds,
        "tokens": joined.tokens,
        "scores": joined.scores,
        **joined.signal,
    }
    if joined.features:
        tensors["features"] = torch.cat(joined.features)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _sums(stored: StoredRows, signals: Iterable[str]) -> bytes:
    """Hashes of an entry's rows and of its features. 16 bytes"""
    rows = [stored.kinds, stored.tokens, stored.scores, *(stored.signal[name] for name in signals)]
    return hash_of_tensors(rows) + hash_of_tensors(stored.features)


def _bytes(digests: Sequence[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1).copy())


# ---- reading ---------------------------------------------------------------------------------------------------------

_INDEX = ("key", "text", "rows", "images", "image_rows", "features_of", "feature_rows", "sums")
_REMEDY = "delete it, and `mmkd cache` adds what is missing"


class TeacherCache:
    """The entries of a folder by key. What other processes add after it was opened is not seen."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = About.load(self.folder)
        self.paths = sorted((self.folder / "shards").glob("*.safetensors"))
        indices = [_read_index(path) for path in self.paths]
        keys = [key.tobytes() for index in indices for key in index["key"]]
        self._keys, self._order = _sorted(keys)
        self._texts, _ = _sorted([text.tobytes() for index in indices for text in index["text"]])
        self._places = _Places(indices)
        self.rows = int(self._places.rows.sum())
        self._sums = np.concatenate([np.zeros((0, 16), np.uint8), *(index["sums"] for index in indices)])
        self._checked = np.zeros((len(self._sums), 2), bool)  # rows and features of entries that this process has read before

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self.find(key) is not None

    def has_text(self, text: bytes) -> bool:
        return _found(self._texts, text) is not None

    def find(self, key: bytes) -> int | None:
        """The number of an entry."""
        place = _found(self._keys, key)
        return None if place is None else int(self._order[place])

    def entry(self, key: bytes, positions: Iterable[str], features: bool = False) -> StoredRows | None:
        """The rows of these kinds of one sample, as views of the memory-mapped shard; None if it is not here."""
        number = self.find(key)
        if number is None:
            return None
        place = self._places.of(number)
        path = self.paths[place.shard]
        try:
            shard = _open_shard(str(path), os.getpid())
            rows = slice(place.row, place.row + place.rows)
            signal = {name: shard[name][rows] for name in self.about.signals}
            stored = StoredRows(shard["kinds"][rows], shard["tokens"][rows], shard["scores"][rows], signal, place.image_rows)
            if features and place.feature_rows:
                whole = shard["features"][place.feature : place.feature + sum(place.feature_rows)]
                stored.features = list(whole.split(place.feature_rows))
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise DataError(f"{path} is damaged or gone ({one_line(error)}); {_REMEDY}") from error
        self._check(number, path, stored, features)
        return stored if {*self.about.rows} <= {*positions} else _cut(stored, positions)

    def _check(self, number: int, path: Path, stored: StoredRows, features: bool) -> None:
        """Raises DataError for an entry that is not what was written; once an entry."""
        wanted = self._sums[number].tobytes()
        if not self._checked[number, 0]:
            rows = [stored.kinds, stored.tokens, stored.scores, *(stored.signal[name] for name in self.about.signals)]
            self._compare(path, wanted[:8], rows)
            self._checked[number, 0] = True
        if features and not self._checked[number, 1]:
            self._compare(path, wanted[8:], stored.features)
            self._checked[number, 1] = True

    def _compare(self, path: Path, wanted: bytes, tensors: Sequence[Tensor]) -> None:
        if hash_of_tensors(tensors) != wanted:
            raise DataError(f"{path} is damaged: an entry is not what was written; {_REMEDY}")

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples whose texts the cache does not know; pictures are looked at when they are needed."""
        return [sample for sample in samples if not self.has_text(text_key(sample))]


def _cut(stored: StoredRows, positions: Iterable[str]) -> StoredRows:
    where = stored.where(positions)
    if bool(where.all()):
        return stored
    signal = {name: tensor[where] for name, tensor in stored.signal.items()}
    images = stored.images if "visual" in set(positions) else []
    return StoredRows(stored.kinds[where], stored.tokens[where], stored.scores[where], signal, images, stored.features)


@dataclass
class _Place:
    """Where a sample's rows and features begin in its shard, and how many there are."""

    shard: int
    row: int
    rows: int
    image_rows: list[int]
    feature: int
    feature_rows: list[int]


class _Places:
    """The places of all samples, in arrays: a list of objects would be copied into every worker."""

    def __init__(self, indices: Sequence[dict[str, np.ndarray]]):
        def joined(name: str) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int64), *(index[name] for index in indices)])

        def begins(counts: np.ndarray) -> np.ndarray:
            return np.cumsum(counts) - counts

        self.shard = np.repeat(np.arange(len(indices)), [len(index["rows"]) for index in indices])
        self.rows = joined("rows")
        self.row = np.concatenate([np.zeros(0, np.int64), *(begins(i["rows"]) for i in indices)])  # in its shard
        self.images, self.image_rows = joined("images"), joined("image_rows")
        self.image = begins(self.images)
        self.pictures, self.feature_rows = joined("features_of"), joined("feature_rows")
        self.picture = begins(self.pictures)
        self.feature = np.concatenate([np.zeros(0, np.int64), *(begins(i["feature_rows"]) for i in indices)])  # in its shard

    def of(self, number: int) -> _Place:
        image, picture = self.image[number], self.picture[number]
        pictures = int(self.pictures[number])
        return _Place(
            int(self.shard[number]),
            int(self.row[number]),
            int(self.rows[number]),
            self.image_rows[image : image + self.images[number]].tolist(),
            int(self.feature[picture]) if pictures else 0,
            self.feature_rows[picture : picture + pictures].tolist(),
        )


def _read_index(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "numpy") as shard:
            index = {name: shard.get_tensor(name) for name in _INDEX}
        named = name_of_shard(path, index.values())
    except (OSError, SafetensorError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"{path} is damaged ({one_line(error)}); {_REMEDY}") from error
    if named != path.stem:
        raise DataError(f"{path} is damaged: its header or index is not what was written; {_REMEDY}")
    return index


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(path: str, process: int) -> dict[str, Tensor]:
    """A shard's tensors, memory-mapped: what is read of them is read from the disk's cache."""
    with safe_open(path, "pt") as shard:
        return {name: shard.get_tensor(name) for name in {*shard.keys()} - {*_INDEX}}


def _sorted(digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Digests as a sorted array of hexadecimal text (workers share its memory, unlike a dict's), and their order."""
    text = np.array([digest.hex().encode() for digest in digests], dtype="S32")
    order = np.argsort(text, kind="stable")
    return text[order], order


def _found(digests: np.ndarray, digest: bytes) -> int | None:
    wanted = digest.hex().encode()
    place = int(np.searchsorted(digests, wanted))
    return place if place < len(digests) and digests[place] == wanted else None

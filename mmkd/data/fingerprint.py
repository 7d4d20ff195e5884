"""What training data are, by their content: names the files of a data set and their pictures by hashes.

A copy has the fingerprint of its original, whatever its times; a file that was rewritten has another, wherever it lies. Only
files that the format reads count (`Format.paths`), so what else lies beside them does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.content import content_hash
from mmkd.data.entries import resolve, source_of
from mmkd.data.formats import format_of
from mmkd.data.lazy import is_lazy
from mmkd.data.samples import ImageRef, Sample, archive_members

# Up to so many bytes in all are hashed; what is larger goes by names, sizes and times of change.
BY_CONTENT = 2 * 2**30
STAND_FOR_ALL = 5000  # samples of a large set


def fingerprint(spec: Any, data_root: str | None = None) -> dict[str, Any]:
    """A data entry: {"fields": what is read, and how, "files": {name below the root: hash}}.

    The root is left out where there are files: a folder may be moved. Of a data set on the hub there are the fields alone.
    Raises DataError where a file is missing.
    """
    if spec.from_ is not None and spec.root is None:  # what it will be follows from its own data
        return {"fields": {"from": spec.from_}, "files": {}}
    fields = resolve(spec)
    fields.pop("text_only")  # says what is expected, not what is read
    answers = {} if (path := fields.pop("answers", None)) is None else {"answers": Path(path)}
    source = source_of(fields, data_root)
    paths = format_of(fields["format"]).paths(source)
    if not paths:
        return {"fields": fields, "files": _states(answers)}
    fields = {key: value for key, value in fields.items() if key != "root"}
    names = {Path(os.path.relpath(path, source.root)).as_posix(): path for path in paths}
    return {"fields": fields, "files": _states(names | answers)}


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """Hash of samples: their words, which also depend on how a format is read, and their pictures.

    Of a large set some samples, spread over it, stand for all: its words are in files that are hashed anyway.
    """
    digest = hashlib.blake2b(digest_size=16)
    if is_lazy(samples):
        digest.update(f"{len(samples)}".encode())
        samples = samples[:: max(1, len(samples) // STAND_FOR_ALL)]
    for sample in samples:
        texts = {key: value for key, value in sample.meta.items() if isinstance(value, str)}
        row = [sample.id, [(turn.role, turn.text, turn.images, *turn.places) for turn in sample.turns], texts]
        row += [[ref.name for ref in sample.images]]
        digest.update(json.dumps(row).encode())
    digest.update(json.dumps(_images_state({ref.key: ref for sample in samples for ref in sample.images}.values())).encode())
    return digest.hexdigest()


def _images_state(refs: Iterable[ImageRef]) -> list[Any]:
    """The content of pictures, in the order of the samples.

    Of an archive's members the sizes and checksums in its directory; pictures in tables and shards by these files.
    """
    state: list[Any] = []
    files: dict[str, Path] = {}
    for ref in refs:
        if ref.file is None:
            state.append(hashlib.blake2b(ref.read_bytes(), digest_size=16).hexdigest())
        elif ref.file.suffix == ".zip":
            state.append([ref.name, _member(ref)])
        else:
            # Only names below the root: the same pictures may lie elsewhere.
            files.setdefault(str(ref.file), ref.file)
    return [state, list(_states(files).values())]


def _member(ref: ImageRef) -> tuple[int, int] | None:
    return archive_members(ref.root).get(ref.name) if ref.root.is_file() else None


def _states(files: dict[str, Path]) -> dict[str, Any]:
    """{name: the file's hash, or size and time where all together are too large, None where it is not there}."""
    stats = {name: path.stat() if path.is_file() else None for name, path in files.items()}
    by_content = sum(stat.st_size for stat in stats.values() if stat) <= BY_CONTENT
    states: dict[str, Any] = {}
    for name, stat in stats.items():
        if stat is None:
            states[name] = None
        elif by_content:
            states[name] = content_hash(files[name], stat)
        else:
            states[name] = [files[name].name, stat.st_size, stat.st_mtime_ns]
    return states

"""The teacher's log-probabilities of preference pairs, computed once and kept on disk by content.

    FOLDER/<fingerprint of the teacher's weights and processor>/rank_N.jsonl
        {"key": hash of token ids, targets and pixels, "id": sample, "answer": "chosen", "tokens": 3, "log_prob": -4.5}

A key says all that a value depends on besides the teacher, so data that changed is computed anew and the rest is
found, in whatever order, split or run. A killed pass goes on after its last whole batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from mmkd.base.bars import bar
from mmkd.errors import DataError, NotFiniteError, one_line
from mmkd.teachers.live import as_teachers
from mmkd.teachers.teacher import Teacher, same_processor
from mmkd.towers.loading import device_of_process
from mmkd.towers.tower import Encoded, Tower
from mmkd.train.guards import check_pixels
from mmkd.train.preference import (
    PreferenceDataset,
    PreferencePair,
    answer_log_probs,
    collate_rejected,
    encode_rejected,
    last_answer,
)
from mmkd.train.skips import LEFT_OUT, Skip

logger = logging.getLogger(__name__)


class LogProbCache:
    """Log-probabilities by key, in the JSON lines of a folder; every process appends to a file of its own."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder = folder
        self.path = folder / f"rank_{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self.values = {row["key"]: row["log_prob"] for path in sorted(folder.glob("rank_*.jsonl")) for row in _rows(path)}

    def add(self, rows: Sequence[dict]) -> None:
        """Appends the rows whose keys are new."""
        new = [row for row in rows if row["key"] not in self.values]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({**row, "sum": row_sum(row)}) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.values |= {row["key"]: row["log_prob"] for row in new}


def _drop_torn_line(path: Path) -> None:
    """A killed process may have left a line without its end."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _rows(path: Path) -> list[dict]:
    """Whole lines of a file; another process may be writing its last one."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        wrong = next((number for number, row in enumerate(rows, 1) if row["sum"] != row_sum(row)), None)
        if wrong is not None:
            raise ValueError(f"line {wrong} is not what was written")
        return [{"key": str(row["key"]), "log_prob": float(row["log_prob"])} for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        told = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{path} is damaged ({told}); delete it, it is computed again") from error


def row_sum(row: dict) -> str:
    """Hash of a row's key and value."""
    return xxhash.xxh3_64(f"{row['key']} {row['log_prob']!r}".encode()).hexdigest()


def fill_reference(
    dataset: PreferenceDataset, teacher: Teacher | Tower, folder: Path, *, batch_size: int, chunk_bytes: int,
    pixels_matter: bool = True,
) -> int:
    """Fills `dataset.reference` from the cache in `folder`, where missing by the teacher; returns how many pairs it read.

    Processes share the pairs. pixels_matter: whether to check, if the teacher runs, that its pictures reach it
    (GuardError). Pairs that one of the models cannot prepare are left out; raises DataError for more than are allowed.
    """
    rank, world = _processes()
    (teacher,) = as_teachers(teacher).values()
    cache = LogProbCache(folder / teacher.fingerprint(), rank)
    same = same_processor(dataset.student, teacher.body)
    dataset.reference.zero_()  # processes add up their shares
    mine = range(rank, len(dataset), world)
    read = 0
    with bar(len(mine), "reference log-probabilities", "pair", shown=rank == 0) as told:
        for start in range(0, len(mine), batch_size):
            indices = list(mine[start : start + batch_size])
            pairs = {i: pair for i in indices if isinstance(pair := dataset[i], PreferencePair)}
            encoded, pairs = _encode_all(dataset, pairs, teacher.body, same)
            keys = [[content_key(answer, chosen) for answer in (chosen, rejected)] for chosen, rejected in encoded]
            # A batch is read as a whole or not at all: what stands beside an answer may change its last bits.
            if any(key not in cache.values for both in keys for key in both):
                if pixels_matter and read == 0:
                    check_pixels("teacher", teacher.running(), [dataset.samples[i] for i in pairs], [c for c, _ in encoded])
                cache.add(_read(teacher.running(), encoded, keys, chunk_bytes))
                read += len(encoded)
            for i, both in zip(pairs, keys, strict=True):
                dataset.reference[i] = torch.tensor([cache.values[key] for key in both], dtype=torch.float64)
            told.update(len(indices))
    if world > 1:
        _add_up(dataset.reference, device_of_process())
    logger.info("reference: the teacher read %d of %d pairs, the others were in %s", read, len(mine), cache.folder)
    return read


def _encode_all(
    dataset: PreferenceDataset, pairs: dict[int, PreferencePair], body: Tower, same: bool
) -> tuple[list[tuple[Encoded, Encoded]], dict[int, PreferencePair]]:
    """The pairs in the teacher's terms, and those of them that it can prepare; the others are left out from now on."""
    encoded, kept = [], {}
    for index, pair in pairs.items():
        try:
            encoded.append(_encode(dataset, index, pair, body, same))
            kept[index] = pair
        except LEFT_OUT as error:
            dataset.leave_out(index)
            dataset.skips.add(Skip.of(dataset.samples[index], error, index, "in the teacher: "))
    return encoded, kept


def _encode(
    dataset: PreferenceDataset, index: int, pair: PreferencePair, body: Tower, same: bool
) -> tuple[Encoded, Encoded]:
    """(chosen, rejected) in the teacher's terms; the student's serve where both towers prepare alike."""
    if same:
        return pair.student, pair.rejected
    sample = dataset.samples[index]
    chosen = body.encode(sample)
    return chosen, encode_rejected(body, sample, chosen)


def content_key(answer: Encoded, chosen: Encoded) -> str:
    """Hash of an answer's token ids and targets and of the pixels, which the chosen one holds."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = {"input_ids": answer.input_ids, "targets": answer.targets, **chosen.pixels}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _read(
    teacher: Tower, encoded: Sequence[tuple[Encoded, Encoded]], keys: list[list[str]], chunk_bytes: int
) -> list[dict]:
    """The cache's rows of some pairs."""
    chosen = teacher.collate([pair[0] for pair in encoded]).to(teacher.device)
    rejected = collate_rejected(teacher, [pair[1] for pair in encoded], chosen).to(teacher.device)
    seen = teacher.see(chosen)
    rows = []
    for place, (name, inputs) in enumerate((("chosen", chosen), ("rejected", rejected))):
        values = answer_log_probs(teacher, inputs, teacher.read(inputs, seen), chunk_bytes).tolist()  # [B]
        tokens = last_answer(inputs).sum(1).tolist()
        if not all(map(math.isfinite, values)):
            raise NotFiniteError(
                f"the teacher's log-probabilities of {', '.join(inputs.ids[:4])} are not finite; check its weights, or take "
                "another dtype (bfloat16 instead of float16)"
            )
        for both, sample, value, count in zip(keys, inputs.ids, values, tokens, strict=True):
            rows.append({"key": both[place], "id": sample, "answer": name, "tokens": count, "log_prob": value})
    return rows


def _processes() -> tuple[int, int]:
    """(rank, number) of the processes that can add up their shares."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _add_up(reference: Tensor, device: torch.device) -> None:
    total = reference.to(device)
    torch.distributed.all_reduce(total)
    reference.copy_(total)

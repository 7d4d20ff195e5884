"""Asks what has no answer yet. Any number of processes share the work: each claims a chunk of prompts by a lock."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mmkd.base.distributed import claimed
from mmkd.writing.answers import KeptAnswers
from mmkd.writing.authors import Author, Request

logger = logging.getLogger(__name__)

WAIT = 0.5  # seconds between looks at what other processes have claimed
WINDOW = 8  # chunks of prompts that are put in order together

T = TypeVar("T")


def ask(
    author: Author, chunks: Callable[[], Iterable[Sequence[Request]]], kept: KeptAnswers, claims: Path, bar: Any = None
) -> None:
    """Returns when every request of every chunk has its row, by this process or another.

    chunks: gives them anew, the same each time. A chunk is claimed, looked for again, asked, and written down as it comes; who
    dies lets go of its claim. Raises TowerError, DataError where the author cannot answer.
    """
    while True:
        elsewhere = 0
        for chunk in chunks():
            if not kept.missing(one.key for one in chunk):
                continue
            name = hashlib.blake2b("".join(one.key for one in chunk).encode(), digest_size=8).hexdigest()
            with claimed(claims / f"{name}.lock") as mine:
                if not mine:
                    elsewhere += 1
                    continue
                kept.refresh()
                _ask_chunk(author, chunk, kept, bar)
        if not elsewhere:
            return
        time.sleep(WAIT)
        kept.refresh()


def _ask_chunk(author: Author, chunk: Sequence[Request], kept: KeptAnswers, bar: Any) -> None:
    missing = set(kept.missing(one.key for one in chunk))
    if not missing:
        return
    todo = [one for one in chunk if author.whole or one.key in missing]
    for request, said in author.answers(todo):
        if request.key in missing:
            missing.discard(request.key)
            kept.add({"key": request.key, "id": request.id, "number": request.number, "by": author.name, **said.row()})
            if bar is not None:
                bar.update(1)
    kept.sync()
    kept.refresh()


def in_chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    found = iter(items)
    while chunk := list(islice(found, size)):
        yield chunk


def ordered(items: Iterable[T], size: int, order: Callable[[list[T]], list[T]]) -> Iterator[list[T]]:
    """Chunks of items that were put in order within a window, so that no more than that is held."""
    for window in in_chunks(items, size * WINDOW):
        yield from in_chunks(order(window), size)

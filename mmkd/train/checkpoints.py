"""Checkpoints that are whole or not there: marked when every file is on the disk, checked when training goes on from one.

    STAGE/checkpoint-N/complete     sizes and hashes of all files of the checkpoint, written last
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmkd.base.checksums import changed
from mmkd.base.distributed import wait_for_all
from mmkd.base.files import remove, room_for, write_sums

logger = logging.getLogger(__name__)

COMPLETE = "complete"
KEPT = 2  # the older one stands in where the newest turns out to be damaged


@contextmanager
def writing_checkpoint(folder: Path, step: int, main: bool, needed: int | None = None) -> Iterator[None]:
    """While the processes write checkpoint `step` of a stage's folder; the main one then marks it and takes away older ones.

    What stands in its place was found not to be whole. needed: bytes, if known. Raises DataError where there is no room;
    nothing of the checkpoint is left then.
    """
    checkpoint = folder / f"checkpoint-{step}"
    if main:
        remove(checkpoint)
    wait_for_all()
    with room_for(checkpoint, needed):
        yield
        if main:
            write_sums(checkpoint, checkpoint / COMPLETE)
    if main:
        marked = [old for old in numbered(folder) if (old / COMPLETE).exists()]
        for old in marked[KEPT:]:  # by number: clocks may be set back
            remove(old)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage; those that are not are named in the log. Every file of it is read."""
    for checkpoint in numbered(folder):
        if not (checkpoint / COMPLETE).exists():
            continue  # its writing was interrupted
        wrong = changed(checkpoint, checkpoint / COMPLETE)
        if not wrong:
            return str(checkpoint)
        logger.warning("%s is damaged (%s); going on from an older one, or from the beginning of the stage", checkpoint, wrong)
    return None


def numbered(folder: Path) -> list[Path]:
    """Checkpoints of a stage, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | str) -> int:
    """The step after which a checkpoint was written."""
    return int(str(checkpoint).rpartition("-")[2])

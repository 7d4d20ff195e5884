"""What it takes to be one of several processes that a launcher (`torchrun`, `accelerate launch`, Slurm) started."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from filelock import FileLock, Timeout

from mmkd.errors import DataError, one_line

# How gloo and NCCL say that the other end is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "remote process exited",
         "NCCL communicator was aborted", "Socket Timeout", "connection was closed")  # fmt: skip

logger = logging.getLogger(__name__)

T = TypeVar("T")


def world_size() -> int:
    """The number of processes that were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main_process() -> bool:
    """Whether this is the one that writes and prints what is written and printed once."""
    return rank() == 0


def wait_for_all() -> None:
    """Returns when every process has come here; at once where none is connected with others."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def of_all(value: T) -> list[T]:
    """The value of each process, in their order; all of them must ask. It goes from CPU to CPU."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value, group=host_group())
    return found


@cache
def host_group() -> Any:
    """Connects the processes' CPUs, whatever connects their accelerators: what comes from these would have to be waited for."""
    import torch

    return torch.distributed.new_group(backend="gloo")


@contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock, a file, or another does; the claim ends with the process, however that ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    claim = FileLock(lock)
    try:
        claim.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        claim.release()


@contextmanager
def alone_in(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """While this run, of one process or several, is the only one that writes to `folder`.

    Another run's claim is waited for where `wait` says so and nobody waits for this process. Raises DataError otherwise.
    """
    if not is_main_process():
        yield
        return
    lock = folder / ".lock"
    with claimed(lock) as mine:
        if mine:
            yield
            return
    if not wait or world_size() > 1:
        raise DataError(f"another run is writing {what} in {folder}; wait until it has ended, or stop it")
    logger.info("waiting for another run that writes %s in %s", what, folder)
    with claimed(lock, wait=True):
        yield


def lost_connection(error: BaseException) -> str | None:
    """That another process of this run ended, where this is why a message to it failed; None for other errors."""
    told = str(error)
    if world_size() == 1 or not (isinstance(error, RuntimeError | OSError) and any(word in told for word in _LOST)):
        return None
    return (
        f"process {rank()} of {world_size()} ends, since another one of this run did ({one_line(told, 120)}); its own output "
        "says why. The same command goes on from what is on the disk"
    )


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code.

    One of several ends without the interpreter's own shutdown: threads of the connection (gloo's) may let go of Python
    objects while it goes on, which aborts a process whose work is done (one in 40 did), and its launcher the others.
    """
    if world_size() == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

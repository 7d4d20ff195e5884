"""SIGTERM, which Slurm and Kubernetes send before they kill: training writes a checkpoint first, everything else ends at once.

Nothing is lost either way; what is written appears whole or not at all.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CODE = 143  # 128 and the number of the signal, as shells have it


class Terminated(BaseException):
    """This process was asked to end. No Exception: code that goes on after errors must not go on after this."""

    def __init__(self, done: str = ""):
        super().__init__(done)


_asked = False
_waiting = 0  # loops that look at `asked` by themselves


@contextmanager
def listening() -> Iterator[None]:
    """While SIGTERM ends this process as described; only a program's main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def asked() -> bool:
    """Whether this process was asked to end."""
    return _asked


@contextmanager
def until_saved() -> Iterator[None]:
    """While a loop looks at `asked` after each of its steps and ends by itself. A second signal ends it at once."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


def _on_signal(number: int, frame: Any) -> None:
    global _asked
    again, _asked = _asked, True
    if again or not _waiting:
        raise Terminated

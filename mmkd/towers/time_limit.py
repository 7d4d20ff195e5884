"""A time limit on what a chat template does: it comes with a model, and may loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmkd.errors import TowerError

SECONDS = 3.0  # far more than the longest conversation takes


@contextmanager
def limited(what: str = "the chat template", seconds: float = SECONDS) -> Iterator[None]:
    """Raises TowerError where the body takes longer. Only a main thread can be interrupted; others are left alone.

    Templates are rendered in the sandbox that transformers makes: without attributes that begin with an underscore, changes of
    what they are given, or ranges beyond 100,000.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TowerError(f"{what} takes longer than {seconds:g} seconds for one conversation: it loops; give another one")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""How far long work has come: a bar on a terminal; in a file, or where nobody looks, a line of the log each minute."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any, Protocol

from mmkd.errors import printable

MINUTE = 60.0  # seconds between lines where no bar can be drawn

logger = logging.getLogger(__name__)


class Bar(Protocol):
    """What `bar` gives: a context manager that counts."""

    n: int

    def update(self, n: int = 1) -> Any: ...

    def __enter__(self) -> Bar: ...

    def __exit__(self, *error: Any) -> Any: ...


def on_terminal() -> bool:
    """Whether somebody watches stderr, where bars are drawn."""
    return sys.stderr.isatty()


def bar(total: int | None, what: str, unit: str, *, shown: bool = True, **options: Any) -> Bar:
    """Counts work of `total` units; None where their number is not known. shown: whether anything is told at all.

    options: of tqdm's, for the terminal.
    """
    if not shown or not on_terminal():
        return Lines(total, what, unit, shown)
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, **options)


class Lines:
    """A bar in words."""

    def __init__(self, total: int | None, what: str, unit: str, shown: bool = True):
        self.n, self.total, self._what, self._unit, self._shown = 0, total, what, unit, shown
        self._began = self._told = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Counts `n` more units."""
        self.n += n
        now = time.monotonic()
        if self._shown and now - self._told >= MINUTE:
            self._told, rate = now, self.n / (now - self._began)
            of = f" of {self.total:,}" if self.total else ""
            left = f", {in_time((self.total - self.n) / rate)} left" if self.total and rate else ""
            logger.info("%s: %s%s %ss, %s a second%s", self._what, f"{self.n:,}", of, self._unit, pace(rate), left)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


def pace(rate: float) -> str:
    """Units a second in few digits."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def in_time(seconds: float) -> str:
    """A length of time as people say it: "8 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(minutes / 60) + hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


class BesideBars(logging.StreamHandler):
    """Writes lines above the bars that are drawn at the moment, not behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            super().emit(record)
            return
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


class Printable(logging.Formatter):
    """Names in data must not write to the terminal what they like."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def quiet_libraries() -> None:
    """Other libraries' bars: none in a file, on a terminal those of what takes a second. Call it before they are imported."""
    os.environ.setdefault("TQDM_DELAY", "1")
    if not on_terminal():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

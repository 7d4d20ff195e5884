"""Numbers as text."""

from __future__ import annotations

import json
from typing import Any


def percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def count(value: float) -> str:
    """1234567 -> "1.23 M", 37.2833 -> "37.3"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def byte_count(value: float) -> str:
    """1234567 -> "1.23 MB"."""
    return count(value).replace(" B", " G").replace(" k", " K") + ("B" if value >= 1000 else " B")


def seconds(value: float) -> str:
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Where mmkd keeps what it can make again: the environment variable MMKD_CACHE, else `mmkd` in the user's folder of caches."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of caches, which may not be there yet."""
    if given := os.environ.get("MMKD_CACHE"):
        return Path(os.path.expanduser(given))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "mmkd"

"""Room for what was seen of pictures, within a budget of bytes. Imports no PyTorch, so that bad data is said at once."""

from __future__ import annotations

from collections import UserDict
from typing import Any

DEFAULT_CACHE_BYTES = 2**30

Key = tuple[str, ...]  # the keys of a sample's images


class VisionCache(UserDict):
    """Seen pictures by the keys of a sample's images; over `max_bytes` the oldest go first.

    Values have `nbytes`. One value larger than the budget is kept alone.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__()
        self.max_bytes, self.bytes = max_bytes, 0

    def __setitem__(self, key: Key, value: Any) -> None:
        if key in self.data:
            del self[key]
        while self.data and self.bytes + value.nbytes > self.max_bytes:
            del self[next(iter(self.data))]
        self.data[key] = value
        self.bytes += value.nbytes

    def __delitem__(self, key: Key) -> None:
        self.bytes -= self.data.pop(key).nbytes

"""The contract of towers and encoders as checks that anybody can call: `mmkd check MODEL`, or the author of a plug-in.

    from mmkd.testing import check_encoder, check_rows, check_tower

The checks are in `mmkd.testing.contracts` and are imported when they are asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["check_encoder", "check_rows", "check_tower", "example_samples"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmkd.testing import contracts

    return getattr(contracts, name)

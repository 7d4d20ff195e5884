"""Errors of preparing one sample: processors and chat templates raise what they like, and none says which sample it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmkd.errors import MmkdError, SampleError
from mmkd.towers.samples import Sample


@contextmanager
def preparing(sample: Sample) -> Iterator[None]:
    """Around the call that prepares a sample: any error of a processor or template becomes a SampleError that names it.

    mmkd's own errors stay what they are; their `sample` says which sample they are about.
    """
    try:
        yield
    except MmkdError as error:
        error.sample = error.sample or sample.id
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        found = SampleError(f"sample {sample.id!r} cannot be prepared: {type(error).__name__}: {words}")
        found.sample = sample.id
        raise found from error

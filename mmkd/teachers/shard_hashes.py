"""Hashes of a cache's shard: of each entry's tensors, and of header and index, which hold the others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor


def hash_of_tensors(tensors: Iterable[Tensor]) -> bytes:
    """Of dtypes, shapes and values. 8 bytes"""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def name_of_shard(path: Path, index: Iterable[np.ndarray]) -> str:
    """What a shard is called: the hash of a safetensors file's header and of its index tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), path.stat().st_size))
    digest = xxhash.xxh3_128(length + header)
    for tensor in index:
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()

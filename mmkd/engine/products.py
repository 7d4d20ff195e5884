"""Products of hidden rows with a head that end in float32 also where the head is in half precision.

A logit of 20 has in bfloat16 a rounding error of up to 0.06, six per cent of a probability. So the products are summed
and kept in float32, in one of two ways:

- *wide*: the device multiplies halves and writes float32 (CUDA, torch 2.8 and later). The gradient at the logits then
  goes back through the head in the head's dtype, as such a product wants it.
- *tiled*: a piece of the head at a time is cast to float32. That takes no rounding at all, and as many bytes as the tile.

Heads in float32 and float64 are multiplied as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# Lifts gradients of probabilities (about 1 / V) out of float16's subnormal range for the product with a head.
_HALF_GAIN = 256.0
# Rows of the head whose gradient is formed at a time where it cannot be summed in place.
_WEIGHT_TILE = 16384
# Rows of the head below which a product is not worth its start.
_LEAST_TILE = 64


class HeadProduct:
    """The products with a head's weight `[V, D]`: to logits, and from a gradient at the logits back."""

    def __init__(self, weight: Tensor, tile_bytes: int):
        """tile_bytes: for the piece of the head that is cast at a time, where that is needed; 64 rows at least."""
        half = weight.dtype in HALVES
        self.weight = weight
        self.dtype = torch.float32 if half else weight.dtype  # of logits
        self.wide = half and writes_float32(weight.device, weight.dtype)
        self.tile = max(_LEAST_TILE, tile_bytes // (weight.shape[1] * self.dtype.itemsize)) if half and not self.wide else None
        self.gradient_dtype = weight.dtype if self.wide else self.dtype
        self.gain = _HALF_GAIN if self.gradient_dtype == torch.float16 else 1.0  # the gradients that come in are lifted so

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden rows as the products take them: rounded to the head's dtype, autocast or not. [c, D]"""
        return hidden.to(self.weight.dtype).to(self.gradient_dtype)

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """`h Wᵀ` into out `[c, V]`, of `dtype`."""
        if self.wide:
            return wide_mm(rows, self.weight.T, out)
        if self.tile is None:
            return torch.mm(rows, self.weight.T, out=out)
        for part, weight in self._tiles():
            torch.mm(rows, weight.T, out=out[:, part])
        return out

    def gradient_store(self, logits: Tensor) -> Tensor:
        """Where the gradient at the logits is put: `[c, V]` of `gradient_dtype`, over the logits' own memory.

        Row i of it reaches no further than row i of the logits does, so rows may be replaced in order.
        """
        return logits.view(-1).view(self.gradient_dtype)[: logits.numel()].view(logits.shape)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """`G W`: from the (lifted) gradient at the logits `[c, V]` to that at the hidden rows, [c, D] in `dtype`."""
        if self.tile is None:
            back = self._product(gradient, self.weight)
        else:
            back = gradient.new_zeros(gradient.shape[0], self.weight.shape[1])  # [c, D]
            for part, weight in self._tiles():
                back.addmm_(gradient[:, part], weight)
        return back if self.gain == 1.0 else back.div_(self.gain)

    def entries_to_hidden(self, ids: Tensor, values: Tensor, limit: int) -> Tensor:
        """The same for a gradient of few entries, not lifted: values `[c, k]` in columns ids `[c, k]`. [c, D] in `dtype`

        Takes up to `limit` bytes for rows of the head.
        """
        step = max(1, limit // (ids.shape[1] * self.weight.shape[1] * self.dtype.itemsize))
        parts = [
            torch.bmm(v.unsqueeze(1), self.weight[i].to(self.dtype)).squeeze(1)
            for i, v in zip(ids.split(step), values.to(self.dtype).split(step), strict=True)
        ]
        return torch.cat(parts)

    def add_to_weight(self, gradient: Tensor, rows: Tensor, into: Tensor, first: bool) -> None:
        """Adds `Gᵀ h` to into `[V, D]`; `first` says that it holds zeros still, which then need not be read."""
        if not self.wide and gradient.dtype == into.dtype:
            into.addmm_(gradient.T, rows, beta=0.0 if first else 1.0)
            return
        for start in range(0, into.shape[0], _WEIGHT_TILE):
            part = slice(start, min(start + _WEIGHT_TILE, into.shape[0]))
            into[part].add_(self._product(gradient[:, part].T, rows), alpha=1 / self.gain)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` in `dtype`, of tensors in `gradient_dtype`."""
        if not self.wide:
            return torch.mm(a, b)
        return wide_mm(a, b, torch.empty(a.shape[0], b.shape[1], dtype=self.dtype, device=a.device))

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        columns, width = self.weight.shape
        store = torch.empty(min(self.tile, columns), width, dtype=self.dtype, device=self.weight.device)
        for start in range(0, columns, self.tile):
            part = slice(start, min(start + self.tile, columns))
            yield part, store[: part.stop - start].copy_(self.weight[part])


@functools.cache
def writes_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this half precision into float32. Tried once a process."""
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        found = wide_mm(ones, ones, torch.zeros(16, 16, device=device))
    except (RuntimeError, TypeError):  # no such kernel; a torch without the argument
        return False
    return bool((found == 16).all())  # some kernels took the argument and wrote halves


def wide_mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` of halves into a float32 tensor."""
    return torch.mm(a, b, out_dtype=torch.float32, out=out)

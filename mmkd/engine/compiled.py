"""The loss maths of a block as one compiled function: softmaxes, values and gradients in a few passes over `[b, V]`.

Compiled are the closed forms of losses that are dense in the vocabulary, all terms of a block together. A loss without one,
or with a gradient in few columns (DBiLD, whose work is two top-k), has nothing to fuse and runs beside them as before.
Products with the heads are not compiled, and nothing waits for the device.

One function is kept for each set of terms, vocabulary, dtype and device, with two graphs at most: one for any number of rows
and one for a single row (torch treats sizes of 1 apart). Weights change with every step and are therefore tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mmkd.errors import RecipeError

logger = logging.getLogger(__name__)


@dataclass
class Part:
    """One term on one block: what `RowTerm` says, cut to the block's rows."""

    loss: Any
    needs_teacher: bool
    weight: float
    mask: Tensor | None  # [b] bool
    factor: Tensor | None  # [b]
    extra: Sequence[Tensor]  # each [b, ...]


def can_compile(loss: Any) -> bool:
    """Whether a loss has a dense closed form. It must be a frozen dataclass too: equal ones then share what was compiled."""
    closed = getattr(loss, "value_and_grad", None) is not None and getattr(loss, "entries", None) is None
    return closed and is_dataclass(loss) and isinstance(loss, Hashable)


def block_losses(x: Tensor, y: Tensor | None, targets: Tensor, parts: Sequence[Part]) -> tuple[list[Tensor], Tensor]:
    """Values of each part, [b] each, and the gradient of their weighted sum with respect to x, `[b, V]`, a tensor of its own.

    x, y: logits of student and teacher, `[b, V]` in the dtype of the maths; y is None where no part reads it.
    """
    extra = [tuple((e.shape[1:], e.dtype) for e in p.extra) for p in parts]
    shapes = tuple((p.mask is None, p.factor is None, e) for p, e in zip(parts, extra, strict=True))
    maths = _compiled(tuple((p.loss, p.needs_teacher) for p in parts), shapes, x.shape[1], x.dtype, x.device)
    # 0-dimensional on the CPU: a graph on an accelerator takes them as numbers, without a copy to wait for.
    weights = [torch.tensor(p.weight, dtype=x.dtype) for p in parts]
    masks, factors, extras = [p.mask for p in parts], [p.factor for p in parts], [list(p.extra) for p in parts]
    if x.shape[0] > 1:
        for tensor in (x, y, targets, *masks, *factors, *(e for extra in extras for e in extra)):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
    return maths(x, y, targets, weights, masks, factors, extras)


@functools.cache
def _compiled(losses: tuple[tuple[Any, bool], ...], *key: Hashable) -> Callable[..., tuple[list[Tensor], Tensor]]:
    names = ", ".join(type(loss).__name__ for loss, _ in losses)
    logger.info("compiling the losses %s once (about 10 seconds, 1 if found on the disk)", names)

    def maths(x, y, targets, weights, masks, factors, extras):
        values, gradient, shared = [], None, {}
        for i, (loss, needs_teacher) in enumerate(losses):
            mask, factor = masks[i], factors[i]
            known = targets if mask is None else targets.masked_fill(~mask, 0)  # [b]
            value, part = loss.value_and_grad(x, y if needs_teacher else None, known, shared, *extras[i])  # [b], [b, V]
            if factor is not None:
                value, part = value * factor, part * factor.unsqueeze(-1)
            if mask is not None:
                value, part = value.masked_fill(~mask, 0), part.masked_fill(~mask.unsqueeze(-1), 0)
            values.append(value)
            gradient = part * weights[i] if gradient is None else gradient + part * weights[i]
        return values, gradient

    # torch counts graphs by code object and stops at a few; a copy gives each of these functions its own count.
    own = FunctionType(maths.__code__.replace(), maths.__globals__, "maths", closure=maths.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Compiles a tiny function on the device. Raises RecipeError where that cannot be done."""
    try:
        found = torch.compile(lambda x: x.exp().sum(-1), fullgraph=True)(torch.zeros(2, 8, device=device))
    except Exception as error:  # whatever a broken tool chain throws: of dynamo, of inductor, of the compiler's process
        needs = "Triton (it comes with torch's CUDA wheels)" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(f"compile is true, but nothing can be compiled on {device.type}: {reason}; install {needs} or leave "
                          "compile out") from error
    if not torch.equal(found.cpu(), torch.full((2,), 8.0)):
        raise RecipeError(f"compile is true, but compiled code gives wrong numbers on {device.type}; leave compile out")

"""Attention within windows, all of one size in one call.

Encoders such as Qwen2.5-VL's cut a picture into windows that attend each to itself. transformers runs an attention that is not
flash attention once a window and layer: thousands of small calls a micro-batch. Flash attention gets whole sequences and where
their windows end, and so does whatever is registered under a name with "flash" in it. This one is torch's
`scaled_dot_product_attention` on batches of windows of equal size; it runs wherever that runs, the CPU included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from mmkd.towers.families import VISION_NAMES, family_of
from mmkd.towers.parts import part_named

NAME = "windows_as_for_flash"


@dataclass(frozen=True)
class Windows:
    """Windows that follow each other along a sequence, ordered by size."""

    groups: list[tuple[int, int]]  # (windows, tokens of each), from the smallest
    order: Tensor | None  # [N] the tokens so that windows of one size follow each other; None where they do already
    back: Tensor | None  # [N] the inverse of `order`

    @staticmethod
    def of(borders: Tensor) -> Windows:
        """borders: [W + 1] where each window begins, and the end. Kept on the tensor: all layers of a pass have the same."""
        known = getattr(borders, "windows", None)
        if known is None:
            known = borders.windows = Windows._found(borders)
        return known

    @staticmethod
    def _found(borders: Tensor) -> Windows:
        begins = borders.tolist()
        spans = [(end - begin, begin) for begin, end in pairwise(begins) if end > begin]
        spans.sort(key=lambda span: span[0])
        groups = [(len(list(same)), tokens) for tokens, same in groupby(length for length, _ in spans)]
        order = torch.cat([torch.arange(begin, begin + length) for length, begin in spans])
        if torch.equal(order, torch.arange(len(order))):
            return Windows(groups, None, None)
        return Windows(groups, order.to(borders.device), order.argsort().to(borders.device))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **given: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of each window to itself, as transformers calls it: [1, H, N, D] each -> [1, N, H, D]."""
    tokens = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [N, H, D] each
    windows = Windows([(1, len(tokens[0]))], None, None) if cu_seq_lens_q is None else Windows.of(cu_seq_lens_q)
    if windows.order is not None:
        tokens = [_Permuted.apply(x, windows.order, windows.back) for x in tokens]
    sizes = [count * length for count, length in windows.groups]
    found = []
    for (count, _), *parts in zip(windows.groups, *(x.split(sizes) for x in tokens), strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)  # [n, H, L, D]
        found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling).transpose(1, 2).flatten(0, 1))
    out = torch.cat(found)  # [N, H, D]
    return (out if windows.back is None else _Permuted.apply(out, windows.back, windows.order)).unsqueeze(0), None


class _Permuted(torch.autograd.Function):
    """Rows [N, ...] in another order; backward is the other way, where `index_select` would add rows up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.back), None, None


AttentionInterface.register(NAME, attend)


def group_windows(model: nn.Module) -> None:
    """Lets the vision encoder of an image-text model of a family with windows take them in groups.

    Only its attention layers are told, by a configuration of their own: a model made of `model.config` has transformers' way.
    """
    if family_of(model.config.model_type).windows:
        encoder = part_named(model.base_model, VISION_NAMES, "vision encoder")
        told = type(encoder.config).from_dict(encoder.config.to_dict(), attn_implementation=NAME)
        for layer in encoder.modules():
            if hasattr(layer, "is_causal"):
                layer.config = told

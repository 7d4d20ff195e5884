"""The rows that a term names.

A row is a position of a sequence together with the token that it predicts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmkd.towers.tower import TowerInputs

# What each kind of position is. A row may be of several.
POSITIONS = {
    "response": "rows that predict a token of an answer",
    "given": "rows that predict a token of an answer of the data",
    "generated": "rows that predict a token of an answer that the student gave itself (`answers: {student: ...}`)",
    "prompt": "rows that predict a text token of the prompt",
    "visual": "rows at visual tokens",
    "answer": "rows at the answer's tokens (the mask without its shift, as LLaVA-MoD's code has it)",
    "text": "response and prompt",
    "all": "everything but padding",
}

# Order of the count vector of a batch. `switch…`: rows of the samples that go through the visual switch.
COUNTS = ("response", "prompt", "visual", "switch", "image", "pictured", "token", "pair", "sample",
          "switch_prompt", "switch_visual", "switch_token", "given", "generated")  # fmt: skip


def rows_at(inputs: TowerInputs, positions: str) -> Tensor:
    """The rows of a batch that `positions` names. [B, L] bool"""
    if positions == "text":
        return inputs.response | inputs.prompt
    if positions == "all":
        return inputs.attention_mask.bool()
    return getattr(inputs, positions)


def counts_by_name(counts: Tensor) -> dict[str, Tensor]:
    """The counts [len(COUNTS)] by what a term may be divided by."""
    by = dict(zip(COUNTS, counts, strict=True))
    by |= {"answer": by["response"], "text": by["response"] + by["prompt"], "all": by["token"]}
    return by | {
        "switch_answer": by["switch"], "switch_text": by["switch"] + by["switch_prompt"], "switch_all": by["switch_token"]
    }


def gathered(hidden: Tensor, where: Tensor) -> Tensor:
    """Rows of hidden [B, L, D] at `where` [B, L] (bool, on the CPU, so that nothing waits for the device). [R, D]"""
    index = where.flatten().nonzero().squeeze(-1)
    return hidden.flatten(0, 1).index_select(0, index.to(hidden.device, non_blocking=True))


def spread(rows: Tensor, where: Tensor) -> Tensor:
    """Rows [r, ...] at the r places of `where` [R] (bool, on the CPU), 0 elsewhere. [R, ...]"""
    if bool(where.all()):
        return rows
    index = where.nonzero().squeeze(-1).to(rows.device, non_blocking=True)
    return rows.new_zeros(len(where), *rows.shape[1:]).index_copy_(0, index, rows)


def image_rows(hidden: Tensor, inputs: TowerInputs) -> list[Tensor]:
    """Hidden rows at the visual positions, one [N, D] an image (the images of a sample have equal token counts).

    inputs: on the CPU.
    """
    samples = gathered(hidden, inputs.visual).split(inputs.visual.sum(1).tolist())
    return [rows for own, images in zip(samples, inputs.images, strict=True) if images for rows in own.chunk(images)]


def any_of(masks: Iterable[Tensor]) -> Tensor:
    """Where at least one of the masks is set."""
    return torch.stack(list(masks)).any(0)

"""Models whose pictures are no tokens of their text: hidden states by the model's ordinary forward pass.

Such a model has nothing that another encoder's visual tokens could stand in for, so it can only be a teacher of rows. Its
pictures go into cross-attention, a Q-Former that reads the question, discrete tokens, or the encoder of an encoder-decoder
model; what stands for them belongs to one sample, so samples are read together only where their inputs have the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import TowerError
from mmkd.towers.families import Family
from mmkd.towers.inputs import IGNORE, Encoded, TowerInputs
from mmkd.towers.parts import first_input

PROMPT = "prompt_"  # begins the names of what the encoder of an encoder-decoder model reads
# Texts beside the prompt, which are filled up to the longest of several samples.
TEXTS = ("prompt_input_ids", "prompt_attention_mask", "qformer_input_ids", "qformer_attention_mask")


def for_decoder(encoded: Encoded, start: int) -> Encoded:
    """A sample of an encoder-decoder model: the prompt goes to the encoder, the decoder begins with `start` and reads the answer.

    The encoder's inputs stand beside the pixels.
    """
    rows = (encoded.targets != IGNORE).nonzero().flatten()
    length = int(rows[0]) + 1 if len(rows) else len(encoded.input_ids)
    prompt, answer = encoded.input_ids[None, :length], encoded.targets[rows]
    beside = {f"{PROMPT}input_ids": prompt, f"{PROMPT}attention_mask": torch.ones_like(prompt)}
    ids = torch.cat([torch.tensor([start]), answer[:-1]])
    targets = answer if len(answer) else torch.tensor([IGNORE])
    return replace(encoded, input_ids=ids, targets=targets, pixels=encoded.pixels | beside)


def hidden_states(model: nn.Module, head: nn.Module, family: Family, inputs: TowerInputs) -> Tensor:
    """Hidden states before the head, by the model's own forward pass over each group of like samples. [B, L, D]"""
    hidden: Tensor | None = None
    for rows in _groups(inputs.each, family):
        length = int(inputs.attention_mask[rows].sum(1).max())
        text = {"input_ids": inputs.input_ids[rows, :length], "attention_mask": inputs.attention_mask[rows, :length]}
        beside = joined([inputs.each[row] for row in rows], family, length)
        own = _before_head(model, head, family, arguments_of(model, family, text, beside))[:, -length:]
        if hidden is None:
            hidden = own.new_zeros(*inputs.input_ids.shape, own.shape[-1])
        hidden[rows, :length] = own
    assert hidden is not None
    return hidden


def generate(model: nn.Module, family: Family, inputs: TowerInputs, max_new_tokens: int, **options: Any) -> list[list[int]]:
    """New tokens of each sample, the likeliest each, one sample at a time.

    By transformers' own generation; for models whose generation reads prompts otherwise, by a forward pass a token.
    """
    rows = []
    for row, each in enumerate(inputs.each):
        length = int(inputs.attention_mask[row].sum())
        ids = inputs.input_ids[row : row + 1, :length]
        if not family.generates:
            rows.append(_one_by_one(model, family, ids, each, max_new_tokens, options["eos_token_id"]))
            continue
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = arguments_of(model, family, text, joined([each], family, length), generating=True)
        out = model.generate(**given, max_new_tokens=max_new_tokens, **options)[0]
        rows.append(out[length if torch.equal(out[:length], ids[0]) else 0 :].tolist())
    return rows


def _one_by_one(
    model: nn.Module, family: Family, ids: Tensor, each: Mapping[str, Tensor], count: int, ends: Sequence[int]
) -> list[int]:
    new: list[int] = []
    while len(new) < count and not (new and new[-1] in ends):
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**arguments_of(model, family, text, joined([each], family, ids.shape[1]))).logits
        new.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, ids.new_tensor([[new[-1]]])], dim=1)
    return new


def arguments_of(
    model: nn.Module, family: Family, text: Mapping[str, Tensor], beside: Mapping[str, Tensor], *, generating: bool = False
) -> dict[str, Any]:
    """The arguments of a forward pass, or of generation; pixels in the dtype of the weights."""
    beside = as_dtype(beside, model)
    if family.encoder_decoder:
        decoder = {f"decoder_{name}": value for name, value in text.items()}
        prompt = {name.removeprefix(PROMPT): value for name, value in beside.items()}
        return prompt | decoder
    found = {**text, **beside}
    if not generating and "use_cache" in signature(model.forward).parameters:
        found["use_cache"] = False
    return found


def as_dtype(values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Pixels in the dtype of a model's weights; whole numbers as they are."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


def _groups(each: Sequence[Mapping[str, Tensor]], family: Family) -> Iterator[list[int]]:
    """Places of samples whose inputs can be joined: the same names and shapes, but for what runs along a text."""
    groups: dict[tuple, list[int]] = {}
    for row, pixels in enumerate(each):
        shapes = [
            (name, (*value.shape[:1], *value.shape[2:]) if name in family.along or name in TEXTS else value.shape)
            for name, value in sorted(pixels.items())
        ]
        groups.setdefault(tuple(shapes), []).append(row)
    yield from groups.values()


def joined(each: Sequence[Mapping[str, Tensor]], family: Family, length: int) -> dict[str, Tensor]:
    """What stands beside the texts of some samples, joined along the first axis."""
    joined = {}
    for name in each[0]:
        values = [pixels[name] for pixels in each]
        if name in family.along:
            values = [_extended(value, length, family.along[name]) for value in values]
        elif name in TEXTS:
            longest = max(value.shape[1] for value in values)
            values = [_extended(value, longest, 0) for value in values]
        joined[name] = torch.cat(values)
    return joined


def _extended(value: Tensor, length: int, fill: int | None) -> Tensor:
    """An input along the text [1, L, ...], continued to `length` with `fill`, or with its last entry where that is None."""
    missing = length - value.shape[1]
    if missing <= 0:
        return value[:, :length]
    if fill is None:
        return torch.cat([value, value[:, -1:].expand(-1, missing, *value.shape[2:])], dim=1)
    return F.pad(value, [0, 0] * (value.dim() - 2) + [0, missing], value=fill)


def _before_head(model: nn.Module, head: nn.Module, family: Family, arguments: Mapping[str, Any]) -> Tensor:
    """What the head is given. Its product with the vocabulary is not computed, unless the model changes single logits."""
    with first_input(head) as captured, nothing_of(head, kept=bool(family.forbidden)):
        model(**arguments)
    if not captured:
        raise TowerError(f"{type(model).__name__} computes its logits without its head, so its rows cannot be had")
    return captured[-1]


@contextmanager
def nothing_of(head: nn.Module, kept: bool = False) -> Iterator[None]:
    """A head that gives a single column for the while, unless it is `kept`."""
    if kept:
        yield
        return
    head.forward = lambda hidden, *_, **__: hidden[..., :1]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def identity(module: nn.Module) -> Iterator[None]:
    """A module that gives back what it is given for the while."""
    module.forward = lambda given, *_, **__: given
    try:
        yield
    finally:
        del module.forward

"""What goes into a tower and what comes out of its eyes: prepared samples, batches, visual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

IGNORE = -100  # target of a position that predicts nothing that is supervised


@dataclass
class Encoded:
    """One sample in a tower's own terms, not yet padded."""

    id: str
    input_ids: Tensor  # [L]
    targets: Tensor  # [L], the token that each position predicts, IGNORE elsewhere
    pixels: dict[str, Tensor]
    images: int
    truncated: int = 0  # answer tokens that did not fit
    own: bool = False  # whether the answer is the student's own, not the data's


@dataclass
class TowerInputs:
    """A batch in a tower's own terms. Positions are padding, prompt, visual or response."""

    ids: list[str]
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    targets: Tensor  # [B, L], shifted already: targets[b, t] is the token after position t
    visual: Tensor  # [B, L] bool, the position holds a visual token
    pixels: dict[str, Tensor]
    images: list[int]  # images of each sample, in order
    # In place of `pixels`, what each sample has of them, for families that read samples apart (`mmkd.towers.tokenless`).
    each: list[dict[str, Tensor]] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # of each sample, whether its answer is the student's own; empty: of none

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TowerInputs:
        move = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("input_ids", "attention_mask", "targets", "visual")
        }
        pixels = {k: v.to(device, non_blocking=non_blocking) for k, v in self.pixels.items()}
        each = [{k: v.to(device, non_blocking=non_blocking) for k, v in own.items()} for own in self.each]
        return replace(self, **move, pixels=pixels, each=each)

    def pin_memory(self) -> TowerInputs:
        """The batch in page-locked memory, from which `non_blocking` copies are."""
        names = ("input_ids", "attention_mask", "targets", "visual")
        pixels = {name: tensor.pin_memory() for name, tensor in self.pixels.items()}
        each = [{name: tensor.pin_memory() for name, tensor in own.items()} for own in self.each]
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names}, pixels=pixels, each=each)

    @property
    def answer(self) -> Tensor:
        """Positions that hold a supervised token: one after those of `response`. [B, L] bool"""
        return F.pad(self.response[:, :-1], (1, 0))

    @property
    def answered(self) -> Tensor:
        """Positions from the first supervised token of a row on: what must not be read in both directions. [B, L] bool"""
        return self.answer.cumsum(1) > 0

    @property
    def response(self) -> Tensor:
        """Rows that predict a supervised token. [B, L] bool"""
        return self.targets != IGNORE

    @property
    def given(self) -> Tensor:
        """Rows that predict an answer of the data. [B, L] bool"""
        return self.response & ~self.generated if self.own else self.response

    @property
    def generated(self) -> Tensor:
        """Rows that predict an answer which the student gave itself. [B, L] bool"""
        own = torch.tensor(self.own or [False] * len(self.ids), device=self.targets.device)
        return self.response & own[:, None]

    @property
    def prompt(self) -> Tensor:
        """Rows that predict a text token of the prompt. [B, L] bool"""
        text = self.attention_mask.bool() & ~self.visual
        return self.attention_mask.bool() & F.pad(text[:, 1:], (0, 1)) & ~self.response

    @property
    def next_ids(self) -> Tensor:
        """The token after each position; 0 at the end. [B, L]"""
        return F.pad(self.input_ids[:, 1:], (0, 1))


@dataclass
class Seen:
    """What a tower saw: one entry an image.

    Some families (Qwen3-VL) also add features of the picture to the hidden states of their first k layers. Those stand behind
    the visual token: such tokens are [n_i, (1 + k) D].
    """

    features: list[Tensor]  # each [n_i, Dv], before the projector; empty where a family does not tell whose is whose
    tokens: list[Tensor]  # each [n_i, D], after it
    output: Any = field(default=None, repr=False)  # transformers' own output object, with whatever else a family adds


@dataclass
class VisualTokens(BaseModelOutputWithPooling):
    """Visual tokens as transformers' models take them, with those that go to their first layers."""

    deepstack_features: list[tuple[Tensor, ...]] | None = None  # of each layer one [n_i, D] an image
    router_logits: Tensor | None = None
    visual_indicator_features: Tensor | None = None  # Ovis2's tokens between pictures, the same for all


def with_answer_ids(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    """A prepared prompt with the tokens of an answer behind it, which are its only targets."""
    answer = torch.tensor(list(ids), dtype=torch.long)
    nothing = torch.full((len(prompt.input_ids) - 1,), IGNORE)
    targets = torch.cat([nothing, answer, torch.tensor([IGNORE])])
    return replace(prompt, input_ids=torch.cat([prompt.input_ids, answer]), targets=targets, own=True)


# ---- from transformers' outputs ----------------------------------------------------------------------------------------


def split_tokens(pooled: Any, inputs: TowerInputs) -> list[Tensor]:
    """Visual tokens, one [n_i, D] an image, from the list or the tensor that a family gives."""
    if not isinstance(pooled, Tensor):
        return list(pooled)
    if pooled.dim() == 3:
        return list(pooled)
    counts = zip(inputs.visual.sum(1).tolist(), inputs.images, strict=True)  # those of one sample have equal shares
    return list(pooled.split([count // images for count, images in counts for _ in range(images)]))


def split_features(captured: list[Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """The projector's inputs, one [n_i, Dv] an image; none where a family's packing does not tell which belongs to which."""
    captured = [batch for batch in captured if batch.dim() > 1]
    features = [f for batch in captured for f in (batch if batch.dim() == 3 else [batch])]
    if len(features) == len(tokens):
        return features
    flat = torch.cat([f.flatten(0, -2) for f in features])  # [sum n, Dv], families that pack all images
    count = sum(len(t) for t in tokens)
    if not count or len(flat) % count:
        return []
    share = len(flat) // count  # encoder positions behind one visual token
    return list(flat.split([len(t) * share for t in tokens]))


def tokens_by_sample(tokens: Iterable[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Each sample's entries of the visual tokens of all of them; `counts`: visual positions of each sample."""
    entries, found = iter(tokens), []
    for missing in counts:  # a picture is one entry, or several where a family cuts it up
        own: list[Tensor] = []
        while missing > 0:
            own.append(next(entries))
            missing -= len(own[-1])
        found.append(own)
    return found

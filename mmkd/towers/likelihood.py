"""How likely a tower finds an answer: logits of choices, and log-probabilities of words at several temperatures at once.

What greedy generation computes anyway is taken from it (`Recorder`). Only a reference that was not the answer costs a
forward pass (`of_words`), in which the pictures are not seen again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mmkd.towers.logits import scaled
from mmkd.towers.protocol import TowerLike

_STEPS, _HALVINGS, _HIGHEST = 4, 5, 2**3.5
TEMPERATURES = tuple(sorted(_HIGHEST * 2 ** -(k / _STEPS) for k in range(_STEPS * _HALVINGS + 1)))  # 0.35 .. 11.3
_ROWS = 64  # of logits that stand at a time
_DIGITS = 4

FirstTokens = tuple[list[int], list[int]]  # what all choices begin with, and the next token of each


@dataclass(frozen=True)
class Likelihood:
    """choices: the logits of a question's choices [k].  own, reference: the log-probability of the words that were answered
    and of the reference, with their end, at each of `TEMPERATURES` [T].  None where it is not known."""

    choices: list[float] | None = None
    own: list[float] | None = None
    reference: list[float] | None = None

    def known(self) -> dict[str, list[float]]:
        """What is known and finite, rounded as it is kept."""
        kept = {name: values for name, values in asdict(self).items() if values is not None and all(map(math.isfinite, values))}
        return {name: [round(value, _DIGITS) for value in values] for name, values in kept.items()}


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` [R] under `logits` [R, V] at each of `TEMPERATURES`. [R, T] float32

    At half of a temperature every exponential is the square of what it was: a few are computed for all temperatures.
    """
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, ids[:, None]) - top  # [R, 1]
    found: dict[float, Tensor] = {}
    for offset in range(_STEPS):
        temperature = _HIGHEST * 2 ** -(offset / _STEPS)
        powers = ((logits - top) / temperature).exp_()  # [R, V]
        for _ in range(_HALVINGS + (offset == 0)):
            found[temperature] = chosen[:, 0] / temperature - powers.sum(-1).log()
            powers.square_()
            temperature /= 2
    return torch.stack([found[temperature] for temperature in sorted(found)], dim=-1)


class Recorder(LogitsProcessor):
    """Keeps what generation passes by: log-probabilities of the words it chooses, and logits of the choices. Changes nothing.

    firsts: of each row the tokens of its choices (see `FirstTokens`), or None.
    """

    def __init__(self, stops: Collection[int], firsts: Sequence[FirstTokens | None]) -> None:
        self._stops, self._firsts = torch.tensor(sorted(stops)), firsts
        self._start: int | None = None
        self._open: Tensor
        self.own: Tensor  # [B, T]
        self.choices: list[list[float] | None] = [None] * len(firsts)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
            self._open = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
            self.own = torch.zeros(len(scores), len(TEMPERATURES), device=scores.device)
        new = input_ids[:, self._start :]  # [B, step]
        if new.shape[1]:
            self._open &= ~torch.isin(new[:, -1], self._stops.to(new.device))
        for row, first in enumerate(self._firsts):
            if first is not None and len(first[0]) == new.shape[1] and new[row].tolist() == first[0]:
                self.choices[row] = scores[row, torch.tensor(first[1], device=scores.device)].float().tolist()
        self.own += torch.where(self._open[:, None], log_probabilities(scores, scores.argmax(-1)), 0.0)
        return scores


@torch.no_grad()
def of_words(tower: TowerLike, inputs: Any, tokens: Sequence[Tensor], words: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of each sample's words, the last tokens of its inputs, at each of `TEMPERATURES`."""
    hidden = tower.read(inputs, tokens)  # [B, L, D]
    ends = inputs.attention_mask.sum(1).tolist()
    rows = torch.cat([hidden[row, end - 1 - len(ids) : end - 1] for row, (end, ids) in enumerate(zip(ends, words, strict=True))])
    ids = torch.tensor([token for own in words for token in own], device=rows.device)  # [R]
    values = torch.cat([
        log_probabilities(logits_of(tower, rows[start : start + _ROWS]), ids[start : start + _ROWS])
        for start in range(0, len(rows), _ROWS)
    ])  # [R, T]  # fmt: skip
    return [part.sum(0).tolist() for part in values.split([len(own) for own in words])]


def logits_of(tower: TowerLike, hidden: Tensor) -> Tensor:
    """A model's own logits of hidden rows. [R, V] Raises TowerError where they are not its head's, scaled or soft-capped."""
    raw = tower.head(hidden).float()
    bias = tower.head_bias
    if bias is not tower.head.bias:
        raw = raw + (bias if tower.head.bias is None else bias - tower.head.bias).float()
    return scaled(raw, tower.logit_rule)

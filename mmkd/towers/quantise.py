"""Weights in few bits: training through quantised weights, and students that lose nothing when they are stored so.

The formats are those in which students are run: `q4_0` and `q8_0` of llama.cpp (GGUF), `nf4` of bitsandbytes (QLoRA, arXiv
2305.14314). Each gives back what it stored before, so a student whose weights are quantised is the same model before
and after it is written in that format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmkd.towers.tower import Tower

BLOCK = 32  # weights of a row that share one scale in llama.cpp's formats
NF4_BLOCK = 64  # weights, over row ends, that share one in nf4


def _q4_0(weight: Tensor) -> Tensor:
    """16 steps of the largest weight's eighth, which keeps its sign; the scale in float16."""
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    steps = torch.where(scale == 0, 0.0, 1 / scale)
    whole = (blocks.double() * steps.double() + 8.5).trunc().clamp(0, 15) - 8
    return (whole.float() * scale.half().float()).reshape(weight.shape).to(weight.dtype)


def _q8_0(weight: Tensor) -> Tensor:
    """255 steps of the largest size's 127th; the scale in float16."""
    blocks = weight.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = torch.where(scale == 0, 0.0, 1 / scale)
    products = blocks * steps
    whole = products.sign() * (products.abs() + 0.5).floor()  # halves away from zero
    return (whole * scale.half().float()).reshape(weight.shape).to(weight.dtype)


def _nf4(weight: Tensor) -> Tensor:
    """16 quantiles of a normal distribution times the block's largest size, by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return dequantize_4bit(codes, state)


@dataclass(frozen=True)
class Format:
    """round: a weight [out, in] -> its values in this format, of equal shape and dtype.  bits: of a weight, scales included.
    columns: what `in` must be a multiple of."""

    round: Callable[[Tensor], Tensor]
    bits: float
    columns: int = 1


FORMATS = {
    "q4_0": Format(_q4_0, 4.5, BLOCK),
    "q8_0": Format(_q8_0, 8.5, BLOCK),
    "nf4": Format(_nf4, 4.5),
}


class FakeQuantisedLinear(nn.Linear):
    """A matrix that computes with quantised weights; gradients pass the rounding as if it were not there (straight through)."""

    format: str

    @classmethod
    def within(cls, layer: nn.Linear, name: str) -> None:
        """Makes `layer` one, in place: its parameters, their names and its hooks stay."""
        layer.__class__, layer.format = cls, name

    def quantised(self) -> Tensor:
        """Its weights as the format holds them."""
        with torch.no_grad():
            return FORMATS[self.format].round(self.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.__dict__.pop("_known", None)
            return functional.linear(inputs, self.weight + (self.quantised() - self.weight).detach(), self.bias)
        if "_known" not in self.__dict__:  # an answer of many tokens rounds once
            self.__dict__["_known"] = self.quantised()
        return functional.linear(inputs, self._known, self.bias)


@dataclass(frozen=True)
class Quantised:
    """What of a student is quantised. left: matrices whose rows no block divides, which stay as they are."""

    format: str
    layers: int
    weights: int
    left: tuple[str, ...]

    def line(self) -> str:
        """For the log."""
        form = FORMATS[self.format]
        left = f"; {len(self.left)} stay as they are, since {form.columns} does not divide their rows" if self.left else ""
        return f"{self.layers} matrices compute with {self.format}: {self.weights:,} weights of {form.bits} bits{left}"


def matrices(tower: Tower, parts: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers of these parts' matrices. The head stays out: formats keep it apart, and losses read its weights."""
    named = {id(p): part for part, parameters in tower.part_parameters().items() for _, p in parameters}
    for name, module in tower.model.named_modules():
        if type(module) is nn.Linear and module is not tower.head and named.get(id(module.weight)) in parts:
            yield name, module


def divisible(tower: Tower, name: str, parts: Sequence[str]) -> tuple[list[nn.Linear], list[str]]:
    """The matrices of these parts that a format can hold, and the names of those that it cannot."""
    found = list(matrices(tower, parts))
    columns = FORMATS[name].columns
    return [m for _, m in found if not m.in_features % columns], [path for path, m in found if m.in_features % columns]


def fake_quantise(tower: Tower, format: str, parts: Sequence[str]) -> Quantised:
    """Makes the matrices of these parts compute with weights in a format of FORMATS, in place."""
    layers, left = divisible(tower, format, parts)
    for layer in layers:
        FakeQuantisedLinear.within(layer, format)
    return Quantised(format, len(layers), sum(layer.weight.numel() for layer in layers), tuple(left))


def settle(tower: Tower) -> None:
    """Puts the quantised weights in the place of the trained ones and makes plain matrices of the layers again."""
    for layer in _fake(tower):
        with torch.no_grad():
            layer.weight.copy_(layer.quantised())
    release(tower)


def release(tower: Tower) -> None:
    """Makes plain matrices of the layers again; their weights stay as trained."""
    for layer in _fake(tower):
        layer.__dict__.pop("_known", None)
        del layer.format
        layer.__class__ = nn.Linear


def _fake(tower: Tower) -> list[FakeQuantisedLinear]:
    return [module for module in tower.model.modules() if isinstance(module, FakeQuantisedLinear)]

"""What a projector is here: something before LLaVA's two matrices, or nothing."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class Projector(nn.Module):
    """From vision features [n, N, D] to what LLaVA's two matrices read, [n, M, width]: one visual token a row.

    A projector of your own is a subclass, registered by `register("projectors", name)`. It takes the width D of the features and
    its options (keyword arguments with defaults, which a recipe sets as `projector_options`) and sets `width`.
    """

    activation: ClassVar[str] = "gelu"  # between the matrices, a name of transformers' ACT2FN
    width: int

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class Matrices(Projector):
    """LLaVA's two matrices and nothing before them: one visual token a feature."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        return features

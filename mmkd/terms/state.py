"""What a term carries from step to step in numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExactState(nn.Module):
    """Numbers as a buffer: in checkpoints, and equal on all ranks."""

    def __init__(self, start: Tensor):
        super().__init__()
        # Their bits as whole numbers: engines that cast all floating-point buffers to half precision would round them.
        self.dtype = start.dtype
        self.register_buffer("bits", start.view(torch.int64 if start.dtype == torch.float64 else torch.int32))

    @property
    def state(self) -> Tensor:
        return self.bits.view(self.dtype)

"""In which precision losses are computed: float64 inside, float32 (or float64, if the inputs are) outside.

A divergence is a small difference of larger numbers: of float32 terms that nearly cancel it keeps three digits where student and
teacher are close or the temperature is high. The functions of this package therefore compute in float64 whatever comes in. The
closed forms that the row engine walks through millions of numbers with stay in float32 and take care otherwise.
"""

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def exact(x: Tensor) -> Tensor:
    """The tensor in the precision of the maths."""
    return x.to(exact_dtype(x))


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """float64 where an input is, else float32: of half precisions, too."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32

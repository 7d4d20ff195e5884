"""Vision features of one width and token count beside those of another."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Bridge(nn.Module):
    """Brings the student's vision features to the teacher's width (trained) and token count (interpolated)."""

    def __init__(self, width: int, teacher_width: int):
        super().__init__()
        self.linear = nn.Linear(width, teacher_width) if width != teacher_width else nn.Identity()

    def forward(self, features: Tensor, count: int) -> Tensor:
        """[..., n, Ds] -> [..., count, Dt]"""
        return self.linear(resample(features, count))


def resample(features: Tensor, count: int) -> Tensor:
    """[..., n, D] -> [..., count, D]: on the square grid where both counts are squares, else along the sequence."""
    *images, tokens, width = features.shape
    if tokens == count:
        return features
    channels = features.mT.reshape(-1, width, tokens)  # [images, D, n]
    side, new_side = round(tokens**0.5), round(count**0.5)
    if side**2 == tokens and new_side**2 == count:
        grid = channels.unflatten(-1, (side, side))
        out = F.interpolate(grid, size=(new_side, new_side), mode="bilinear", align_corners=False).flatten(2)
    else:
        out = F.interpolate(channels, size=count, mode="linear", align_corners=False)
    return out.mT.reshape(*images, count, width)

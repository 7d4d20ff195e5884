"""Training and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Under these names modules of transformers and timm keep how much they drop in training.
_SHARES = ("drop_prob", "attention_dropout", "dropout", "dropout_prob", "hidden_dropout", "activation_dropout", "p_dropout")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode afterwards, since a model in training may have parts that are not."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def varies_in_training(model: nn.Module) -> bool:
    """Whether a model computes something else in training mode than in evaluation mode: dropout, dropped paths, batch norm."""
    for module in model.modules():
        if isinstance(module, _NORMS) or (isinstance(module, _DROPOUTS) and module.p > 0):
            return True
        shares = [vars(module).get(name) for name in _SHARES]
        if any(isinstance(share, float) and share > 0 for share in shares):
            return True
    return False

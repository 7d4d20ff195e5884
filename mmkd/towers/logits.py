"""From the head's products to a model's logits: the scale and the soft cap between them, measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.towers.modes import evaluating
from mmkd.towers.parts import first_input

LogitRule = tuple[float, float | None]  # scale, soft cap


def scaled(raw: Tensor, rule: LogitRule) -> Tensor:
    """Logits of the head's products `h Wᵀ + b`: `cap * tanh(scale * raw / cap)`, or without a cap `scale * raw`."""
    scale, cap = rule
    return raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)


def measured_rule(model: nn.Module, head: nn.Module, tokenizer: Any) -> LogitRule:
    """The rule that explains the model's own logits of a short text (see `scaled`).

    A text configuration names scale and cap (Granite, Cohere, Gemma, Muse), but not every class around it applies them.
    Raises TowerError when no rule explains the logits.
    """
    candidates = _candidates(model.config.get_text_config())
    if len(candidates) == 1:
        return candidates[0]
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer("a b c", add_special_tokens=False)["input_ids"]], device=device)  # [1, L]
    with evaluating(model), torch.no_grad():
        with first_input(head) as given:
            own = model(input_ids=ids, use_cache=False).logits.float()  # [1, L, V]
        base = model.base_model
        hidden = given[0] if base is model else base(input_ids=ids, use_cache=False).last_hidden_state  # some scale them first
        raw = head(hidden).float()[..., : own.shape[-1]]  # [1, L, V]
    # The nearest, not the first within reach: small logits are hardly capped, and every rule seems to hold for them.
    errors = {rule: float((scaled(raw, rule) - own).abs().max()) for rule in candidates}
    best = min(candidates, key=errors.__getitem__)
    if errors[best] <= 1e-2 * float(own.abs().max()):
        return best
    raise TowerError(f"the logits of {type(model).__name__} are not its head's, scaled or soft-capped; it cannot distil")


def _candidates(config: Any) -> list[LogitRule]:
    """What a text configuration names, whole and in part."""
    factors = [getattr(config, name, None) for name in ("logit_scale", "output_multiplier")]
    divisors = [getattr(config, name, None) for name in ("logits_scaling", "logits_mup_width_multiplier")]
    divisor = next(filter(None, divisors), None)
    scale = 1.0 / divisor if divisor else next(filter(None, factors), 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return list(dict.fromkeys([(1.0, None), (scale, cap), (scale, None), (1.0, cap)]))

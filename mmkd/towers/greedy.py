"""Generation for a batch whose visual tokens are known, reading what questions on one picture share once.

In LLaVA's prompts the picture stands before the question: the language model's keys and values up to there are the same for all
questions on it. They are made once a picture, and copied to its questions; only the questions themselves are read row by row.
The padding then stands between picture and question, where the mask hides it. Whether a model gives the same logits
that way is measured on the first batch; one that does not (a sliding window, attention in both directions over the prompt) is
asked in the ordinary way.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from mmkd.errors import NotFiniteError
from mmkd.towers.inputs import Encoded
from mmkd.towers.protocol import TowerLike

FAMILY = "llava"  # others place visual tokens by grids, types or absolute positions
SHARING = 2  # questions a picture, on average, from which on sharing pays for its second forward pass
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of logits, relative to the largest; half precision:
_HALF_TOLERANCE = 5e-2

logger = logging.getLogger(__name__)
_fits: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prompt:
    """One row of a batch: prepared ids, the visual tokens of its pictures (each [n, D]), and what names the pictures."""

    encoded: Encoded
    tokens: list[Tensor]
    key: Hashable


def generated(
    tower: TowerLike, prompts: Sequence[Prompt], max_new_tokens: int, processors: Sequence[LogitsProcessor] = (), **options: Any
) -> Tensor:
    """New tokens of every prompt, padded behind their end: the likeliest after what `processors` make of the logits. [B, new]

    options: more arguments of the model's `generate`.
    """
    way = _shared if _shares(tower, prompts) else _apart
    return way(tower, prompts, max_new_tokens, processors, **options)


def _apart(
    tower: TowerLike,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Tensor:
    """Every prompt read whole, left-padded. New tokens [B, new], or with None the logits of the first [B, V]."""
    inputs = tower.collate([prompt.encoded for prompt in prompts], padding_side="left").to(tower.device)
    tokens = [token for prompt in prompts for token in prompt.tokens]
    visual = {"mm_encoder_outputs": tower.encoder_outputs(tokens), **tower.layout(inputs)}
    return _generate(tower, inputs.input_ids, inputs.attention_mask, max_new_tokens, processors, **visual, **options)


def _shared(
    tower: TowerLike,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Tensor:
    """The same, with what stands before the questions read once a picture."""
    length = _prefix_length(tower, prompts[0])
    first: dict[Hashable, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key, prompt)
    heads = tower.collate([_cut(prompt.encoded, slice(0, length)) for prompt in first.values()]).to(tower.device)
    cache = DynamicCache(config=tower.model.config.get_text_config())
    tower.base(
        input_ids=heads.input_ids,
        attention_mask=heads.attention_mask,
        mm_encoder_outputs=tower.encoder_outputs([token for prompt in first.values() for token in prompt.tokens]),
        past_key_values=cache,
        use_cache=True,
    )
    places = {key: number for number, key in enumerate(first)}
    rows = torch.tensor([places[prompt.key] for prompt in prompts], device=tower.device)
    cache.batch_select_indices(rows)
    tails = tower.collate([_cut(p.encoded, slice(length, None)) for p in prompts], padding_side="left").to(tower.device)
    ids = torch.cat([heads.input_ids[rows], tails.input_ids], dim=1)  # [B, L]
    mask = torch.cat([heads.attention_mask[rows], tails.attention_mask], dim=1)  # [B, L]
    return _generate(tower, ids, mask, max_new_tokens, processors, past_key_values=cache, **options)


def _generate(
    tower: TowerLike, ids: Tensor, mask: Tensor, max_new_tokens: int | None, processors: Sequence[LogitsProcessor], **inputs: Any
) -> Tensor:
    largest = _Largest()
    out = tower.model.generate(
        input_ids=ids,
        attention_mask=mask,
        **inputs,
        max_new_tokens=max_new_tokens or 1,
        do_sample=False,
        num_beams=1,
        pad_token_id=tower.pad_id,
        eos_token_id=sorted(tower.stop_ids),
        return_dict_in_generate=True,
        output_logits=max_new_tokens is None,
        logits_processor=LogitsProcessorList([largest, *processors]),
    )
    largest.check()
    return out.logits[0] if max_new_tokens is None else out.sequences[:, ids.shape[1] :]


class _Largest(LogitsProcessor):
    """Keeps the largest logit of every row, which is NaN or infinite where no token is the likeliest; changes nothing."""

    def __init__(self) -> None:
        self.found: Tensor | None = None  # [B], of the sum over the tokens so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        largest = scores.amax(-1).float()
        self.found = largest if self.found is None else self.found + largest
        return scores

    def check(self) -> None:
        check_logits(self.found)


def check_logits(logits: Tensor | None) -> None:
    """Raises NotFiniteError for logits by which no answer can be chosen."""
    if logits is not None and not bool(torch.isfinite(logits).all()):
        raise NotFiniteError(
            "the model's logits are not finite, so it has no answers: its numbers leave the range of its dtype; take another "
            "(--dtype bfloat16 or float32), or check its weights"
        )


def _cut(encoded: Encoded, part: slice) -> Encoded:
    return replace(encoded, input_ids=encoded.input_ids[part], targets=encoded.targets[part])


def _prefix_length(tower: TowerLike, prompt: Prompt) -> int:
    """Positions up to and with the last visual token."""
    return int((prompt.encoded.input_ids == tower.image_token_id).nonzero()[-1]) + 1


def _shares(tower: TowerLike, prompts: Sequence[Prompt]) -> bool:
    """Whether several questions stand behind each picture, all at the same place, and the model reads them alike that way."""
    keys = {prompt.key for prompt in prompts}
    if not all(prompt.tokens for prompt in prompts) or len(prompts) < SHARING * len(keys):
        return False
    if tower.model.config.model_type != FAMILY or _fits.get(tower.model) is False:
        return False
    length = _prefix_length(tower, prompts[0])
    heads: dict[Hashable, list[int]] = {}
    for prompt in prompts:
        ids = prompt.encoded.input_ids
        head = ids[:length].tolist()
        if _prefix_length(tower, prompt) != length or len(ids) <= length or heads.setdefault(prompt.key, head) != head:
            return False
    if tower.model not in _fits:
        _fits[tower.model] = _reads_alike(tower, prompts)
    return _fits[tower.model]


def _reads_alike(tower: TowerLike, prompts: Sequence[Prompt]) -> bool:
    """Compares the first logits of a few prompts both ways; the cache must be one whose rows can be chosen."""
    cache = DynamicCache(config=tower.model.config.get_text_config())
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    few = sorted(prompts, key=lambda prompt: len(prompt.encoded.input_ids))
    few = [few[0], *few[1:-1][:2], few[-1]]
    apart, shared = (way(tower, few, None).float() for way in (_apart, _shared))
    difference, largest = (apart - shared).abs().max(), apart.abs().max()
    same = bool(difference <= _TOLERANCE.get(tower.model.dtype, _HALF_TOLERANCE) * largest)
    if not same:
        logger.info("%s: questions on one picture are read whole (logits differ by %.2g)", type(tower.model).__name__, difference)
    return same

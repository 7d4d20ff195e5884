"""Sampled generation whose draws belong to the sample, not to the batch.

Each answer has a seed of its own: one number between 0 and 1 a token, by which the token is read off the distribution's sum. So
an answer is the same in any batch, in any process and after a restart, and the process's own random numbers are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mmkd.towers.answering import see_prompts
from mmkd.towers.greedy import generated
from mmkd.towers.inputs import Encoded
from mmkd.towers.modes import evaluating
from mmkd.towers.protocol import TowerLike


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0: the likeliest token.  top_p 1 and top_k 0: from all tokens."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@torch.no_grad()
def sample(tower: TowerLike, prompts: Sequence[tuple[Encoded, object]], seeds: Sequence[int], how: Sampling) -> list[list[int]]:
    """Answers of a batch, as token ids; one that came to its end has the end token as its last.

    prompts: each as `encode(sample, with_answer=False)` gives it, and what names its pictures, which are seen once for all
    prompts with the same name.  seeds: one an answer.
    No answer holds a token that stands for a picture or that the tokenizer does not know. Raises NotFiniteError.
    """
    draws = torch.stack([
        torch.rand(how.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ])  # [B, T]  # fmt: skip
    with evaluating(tower.model), tower.given_tokens():
        seen, processors = see_prompts(tower, prompts), _processors(tower, draws, how)
        # What is drawn is drawn from the model's own distribution.
        rows = generated(tower, seen, how.max_new_tokens, processors, repetition_penalty=1.0).tolist()
    return [_up_to_end(row[: how.max_new_tokens], tower.stop_ids) for row in rows]


def _processors(tower: TowerLike, draws: Tensor, how: Sampling) -> LogitsProcessorList:
    found: list[LogitsProcessor] = [_Sayable(tower)]
    if how.temperature > 0:
        found += [TemperatureLogitsWarper(how.temperature)] if how.temperature != 1 else []
        found += [TopKLogitsWarper(how.top_k)] if how.top_k > 0 else []
        found += [TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
        found.append(_Drawn(draws))
    return LogitsProcessorList(found)


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    place = next((n for n, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: place + 1]


class _Sayable(LogitsProcessor):
    """Leaves out ids that no answer can hold: pictures' placeholders, and padding rows of the head."""

    def __init__(self, tower: TowerLike):
        self.known = len(tower.tokenizer)
        own = getattr(tower.preparer.processor, "image_token_ids", None) or []
        config = tower.model.config
        more = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        self.pictures = sorted({i for i in (tower.image_token_id, *own, *more) if isinstance(i, int) and 0 <= i < self.known})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.known :] = -torch.inf
        scores[:, self.pictures] = -torch.inf
        return scores


class _Drawn(LogitsProcessor):
    """Makes the drawn token the only possible one."""

    def __init__(self, draws: Tensor):
        self.draws, self.step = draws, 0  # [B, T]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        up_to = scores.double().softmax(-1).cumsum(-1)  # [B, V]
        place = self.draws[:, self.step, None].to(up_to.device) * up_to[:, -1:]
        self.step += 1
        token = (up_to <= place).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)  # [B, 1], never one of probability 0
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def text_of(tokenizer: object, ids: Iterable[int]) -> str:
    """What an answer says, without its end."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

"""Facts about rows that do not depend on how a step is cut: a key for each, and the words that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.terms.alignment import token_bytes
from mmkd.towers.tower import Tower


def row_keys(ids: Sequence[str], samples: Tensor) -> Tensor:
    """A number for each row, from its sample's id and its place among the sample's rows alone: equal in any micro-batch and on
    any rank. samples: which of the ids a row is of, in order. [R] -> [R], int64"""
    names = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True) for name in ids]
    place = torch.arange(len(samples)) - torch.searchsorted(samples, samples)  # [R] sorted: where a sample's rows begin
    return mixed(torch.tensor(names, dtype=torch.int64)[samples] + place)


def mixed(keys: Tensor) -> Tensor:
    """A bijection of int64 that leaves no order: products (which overflow) and shifts. [R] -> [R]"""
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A6B1EF3B):
        keys = (keys ^ (keys >> 31)) * factor
    return keys ^ (keys >> 31)


def word_borders(tower: Tower, words: bool = True) -> Tensor:
    """Of each token: whether it begins with white space, ends with it, is in no word. [3, V] bool

    Tokens that end an answer or a turn end a word and are in none. words: false takes all other tokens for one word.
    Raises TowerError for tokenizers that do not keep the text's bytes (`terms.alignment`).
    """
    ends = {*tower.tokenizer.all_special_ids, *tower.stop_ids}
    texts = token_bytes(tower) if words else [b"-"] * len(tower.tokenizer)
    found = [(t[:1].isspace(), t[-1:].isspace() or i in ends, t.isspace() or i in ends) for i, t in enumerate(texts)]
    return torch.tensor(found).T


def word_numbers(borders: Tensor, samples: Tensor) -> Tensor:
    """A number for the word of each row, -1 for none. borders: `word_borders` of the predicted tokens [3, R]. [R]"""
    begins, ends, outside = borders
    new = begins.clone()
    new[1:] |= ends[:-1] | (samples[1:] != samples[:-1])
    return new.long().cumsum(0).masked_fill(outside, -1)

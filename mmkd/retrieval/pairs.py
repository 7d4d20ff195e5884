"""Image-text pairs for retrieval, from any data entry of a recipe: the pictures, and the answers as their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmkd.data.entries import folder_of, resolve
from mmkd.data.formats import read_split
from mmkd.data.samples import ImageRef, Question, Sample
from mmkd.errors import DataError


@dataclass(frozen=True)
class PairSet:
    """Distinct pictures, distinct captions, and which belong together.

    `pairs` [P, 2] holds (number of the picture, number of the caption) in the order of the data. A picture may have several
    captions and a caption several pictures. Captions that differ only in case or white space are one.
    """

    images: tuple[ImageRef, ...]
    texts: tuple[str, ...]
    pairs: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def _known(self) -> Tensor:
        return self._key(self.pairs[:, 0], self.pairs[:, 1])  # [P]

    def _key(self, images: Tensor, texts: Tensor) -> Tensor:
        return images * len(self.texts) + texts

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Which pictures go with which captions: numbers [Q], [M] -> [Q, M] bool."""
        keys = self._key(images.cpu()[:, None], texts.cpu()[None, :])
        return torch.isin(keys, self._known).to(images.device)

    def relevance(self) -> Tensor:
        """Every picture against every caption. [images, texts] bool"""
        relevant = torch.zeros(len(self.images), len(self.texts), dtype=torch.bool)
        relevant[self.pairs[:, 0], self.pairs[:, 1]] = True
        return relevant


def pair_set(pairs: Sequence[tuple[ImageRef, str]]) -> PairSet:
    """Numbers the pictures (by file) and captions (but for case and white space) of some pairs, and drops repeated pairs."""
    images: dict[str, ImageRef] = {}
    texts: dict[str, str] = {}
    for image, text in pairs:
        images.setdefault(image.key, image)
        texts.setdefault(_plain(text), text)
    image_numbers = {key: number for number, key in enumerate(images)}
    text_numbers = {key: number for number, key in enumerate(texts)}
    numbers = dict.fromkeys((image_numbers[image.key], text_numbers[_plain(text)]) for image, text in pairs)
    return PairSet(tuple(images.values()), tuple(texts.values()), torch.tensor(list(numbers)).reshape(-1, 2))


def read_pairs(specs: Sequence[Any], seed: int, data_root: str | None = None) -> PairSet:
    """The pairs of a recipe's data entries: each picture with each of its answers. Raises DataError.

    A question's captions are all its references; a conversation's is its last answer. `weight` has no meaning here and is
    refused: a pair counts once.
    """
    pairs = [pair for spec in specs for pair in _entry_pairs(spec, seed, data_root)]
    if not pairs:
        raise DataError("the data entries hold no pair of a picture and a caption")
    return pair_set(pairs)


def _entry_pairs(spec: Any, seed: int, data_root: str | None) -> list[tuple[ImageRef, str]]:
    fields = resolve(spec)
    if fields["weight"] != 1:
        raise DataError(f"weight {fields['weight']} of a data entry: pairs count once; take `weight` out")
    root = folder_of(fields, data_root)
    subset = {"limit": fields.get("limit"), "image_limit": fields.get("image_limit"), "seed": seed}
    items = read_split(fields["format"], root, fields["split"], files=fields["files"], **subset)
    rows = [(item.id, item.images, _captions(item)) for item in items]
    return [(_only(name, images), caption.strip()) for name, images, captions in rows for caption in captions if caption.strip()]


def _captions(item: Question | Sample) -> tuple[str, ...]:
    if isinstance(item, Sample):
        return (item.answer,)
    return item.references or (item.answer,)


def _only(name: str, images: tuple[ImageRef, ...]) -> ImageRef:
    if len(images) != 1:
        raise DataError(f"{name!r} has {len(images)} pictures; a pair has one picture and one caption")
    return images[0]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())

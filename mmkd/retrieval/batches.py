"""Batches of pairs, prepared for the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkd.data.samples import ImageRef
from mmkd.retrieval.dual_encoders import Inputs
from mmkd.retrieval.pairs import PairSet
from mmkd.train.batch_file import KINDS

Sums = dict[str, tuple[Tensor, Tensor]]  # {term: (sum, count)}, as a training module gives them for the log

PIXEL_BYTES = 2**29  # prepared pictures that are kept in memory, about


@dataclass
class PairBatch:
    """A batch of pairs, prepared for a model; `images` and `texts` are their numbers in the pair set. [B]"""

    images: Tensor
    texts: Tensor
    pixels: Inputs
    tokens: Inputs

    @property
    def ids(self) -> list[str]:
        """The pairs' numbers of picture and text."""
        return [f"picture {i} with text {t}" for i, t in zip(self.images.tolist(), self.texts.tolist(), strict=True)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        def move(inputs: Inputs) -> Inputs:
            return {k: v.to(device, non_blocking=non_blocking) for k, v in inputs.items()}

        return PairBatch(self.images.to(device), self.texts.to(device), move(self.pixels), move(self.tokens))


KINDS[PairBatch.__name__] = PairBatch


class PixelCache:
    """Prepared pictures by number: kept in memory, since preparing small pictures takes longer than a step with them."""

    def __init__(self, images: Sequence[ImageRef], prepare: Callable[[list[ImageRef]], Inputs]):
        self.images, self.prepare = images, prepare
        self._kept: dict[int, Inputs] = {}
        self._bytes = 0

    def __call__(self, numbers: Sequence[int]) -> Inputs:
        """Inputs of the pictures of these numbers, in their order."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self._kept]
        fresh = self._prepared(missing) if missing else {}
        rows = [fresh[number] if number in fresh else self._kept[number] for number in numbers]
        if self._bytes < PIXEL_BYTES:
            self._kept |= fresh
            self._bytes += sum(tensor.nbytes for row in fresh.values() for tensor in row.values())
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _prepared(self, numbers: list[int]) -> dict[int, Inputs]:
        inputs = self.prepare([self.images[number] for number in numbers])
        return {number: {name: tensor[i] for name, tensor in inputs.items()} for i, number in enumerate(numbers)}


class PairDataset(Dataset):
    """The pairs of a set by number; `collate` loads and prepares them for the model that is trained."""

    def __init__(self, pairs: PairSet, model: Any):
        self.pairs, self.model = pairs, model
        self.pixels = PixelCache(pairs.images, self.prepare_images)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int]:
        image, text = self.pairs.pairs[index].tolist()
        return image, text

    def collate(self, numbers: Sequence[tuple[int, int]]) -> dict[str, PairBatch]:
        images, texts = ([n[i] for n in numbers] for i in (0, 1))
        tokens = self.prepare_texts([self.pairs.texts[t] for t in texts])
        return {"batch": PairBatch(torch.tensor(images), torch.tensor(texts), self.pixels(images), tokens)}

    def prepare_images(self, images: Sequence[ImageRef]) -> Inputs:
        """Pictures as the model takes them."""
        return self.model.prepare_images([image.load() for image in images])

    def prepare_texts(self, texts: Sequence[str]) -> Inputs:
        """Texts as the model takes them."""
        return self.model.prepare_texts(texts)

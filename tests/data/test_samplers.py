from collections import Counter

import pytest
import torch

from mmkd.data.samplers.length import LengthGroupedSampler
from mmkd.data.samplers.spec import SamplerSpec


def lengths(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 2, (n,), generator=generator).tolist()
    return list(zip(images, torch.randint(1, 500, (n,), generator=generator).tolist(), strict=True))


def batches(sampler, size):
    order = list(sampler)
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_every_sample_once_an_epoch_and_another_order_the_next():
    sampler = LengthGroupedSampler(lengths(1003), 8, seed=3)
    first = list(sampler)
    assert Counter(first) == Counter(range(1003))
    assert list(sampler) == first == list(LengthGroupedSampler(lengths(1003), 8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first and Counter(sampler) == Counter(first)


def test_batches_hold_similar_lengths_and_come_in_no_order_of_length():
    found = lengths(2000)
    grouped = batches(LengthGroupedSampler(found, 10, seed=0), 10)
    spread = [max(found[i][1] for i in b) - min(found[i][1] for i in b) for b in grouped]
    assert sum(spread) / len(spread) < 50  # about 400 for random batches
    assert sum(len({found[i][0] for i in b}) == 1 for b in grouped) >= 0.9 * len(grouped)
    sizes = torch.tensor([float(found[b[0]][1]) for b in grouped])
    assert torch.corrcoef(torch.stack([sizes[:-1], sizes[1:]]))[0, 1].abs() < 0.2


@pytest.mark.parametrize("short", ["length", {"length": None}, {"length": {}}])
def test_short_forms_name_the_same_sampler(short):
    assert SamplerSpec.model_validate(short) == SamplerSpec(kind="length")

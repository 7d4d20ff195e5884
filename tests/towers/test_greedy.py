"""Questions on one picture share what stands before them; a model that reads otherwise is asked in the ordinary way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_picture, tiny_tower

from mmkd.data.samples import Sample, Turn
from mmkd.towers import greedy
from mmkd.towers.tower import Tower

TEXTS = ("red", "green round", "left of the blue square and right of red", "A B C", "round", "blue blue")


def samples(folder: Path, pictures: int = 3) -> list[Sample]:
    """Six questions of different length on each picture, and no two neighbours on the same."""
    refs = [tiny_picture(folder, f"{n}.png", seed=n) for n in range(pictures)]
    return [Sample(f"{text}-{n}", (ref,), (Turn("user", text, images=1),)) for text in TEXTS for n, ref in enumerate(refs)]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which whole batches were asked, in order."""
    taken: list[str] = []

    def noted(name: str):
        way = getattr(greedy, name)

        def run(tower, prompts, max_new_tokens, *processors, **options):
            if max_new_tokens is not None:  # else logits are compared
                taken.append(name)
            return way(tower, prompts, max_new_tokens, *processors, **options)

        return run

    for name in ("_apart", "_shared"):
        monkeypatch.setattr(greedy, name, noted(name))
    return taken


def apart(tower: Tower, batch: list[Sample]) -> list[str]:
    """Each question alone in its batch: there is nothing to share."""
    return [tower.answer([sample], max_new_tokens=6)[0] for sample in batch]


@pytest.mark.parametrize(
    ("vision", "language", "way"),
    [("vit", "llama", "_shared"), ("siglip", "qwen2", "_shared"), ("vit", "mistral", "_apart")],  # the last: a sliding window
)
def test_shared_prompts_give_the_same_answers(vision: str, language: str, way: str, tmp_path: Path, ways: list[str]) -> None:
    tower, batch = tiny_tower(vision=vision, language=language), samples(tmp_path)
    together = tower.answer(batch, max_new_tokens=6)
    assert ways == [way]
    assert together == apart(tower, batch) and len(set(together)) > 6
    assert set(ways[1:]) == {"_apart"}


def test_pictures_are_not_mixed_up(tmp_path: Path) -> None:
    tower, batch = tiny_tower(), samples(tmp_path)
    answers = tower.answer(batch, max_new_tokens=6)
    assert tower.answer(batch[::-1], max_new_tokens=6) == answers[::-1]
    other = [replace(sample, images=batch[0].images) for sample in batch]
    assert tower.answer(other, max_new_tokens=6) != answers


def test_without_enough_to_share_prompts_are_read_whole(tmp_path: Path, ways: list[str]) -> None:
    tower, batch = tiny_tower(), samples(tmp_path)
    tower.answer(batch[:4], max_new_tokens=6)  # four questions on three pictures
    blind = [sample.without_images() for sample in batch]
    tower.answer(blind, max_new_tokens=6)
    mixed = [batch[0], batch[3], batch[6], blind[0]]
    assert tower.answer(mixed, max_new_tokens=6) == apart(tower, mixed)
    assert "_shared" not in ways


def test_a_model_that_reads_otherwise_is_asked_in_the_ordinary_way(tmp_path: Path, monkeypatch, ways: list[str]) -> None:
    tower, batch = tiny_tower(), samples(tmp_path)
    shared = greedy._shared

    def wrong(*arguments):
        logits = shared(*arguments)
        return logits + 0.01 * torch.arange(logits.shape[1])

    monkeypatch.setattr(greedy, "_shared", wrong)
    assert tower.answer(batch, max_new_tokens=6) == apart(tower, batch)
    assert set(ways) == {"_apart"}

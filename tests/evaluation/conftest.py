"""A small benchmark on disk and a tower that answers from a dict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmkd.data.samples import Sample
from mmkd.evaluation.benchmarks import Benchmark


class Seen(list):
    """Pictures as a tower would keep them."""

    nbytes = 100


class FakeTower:
    """Answers from a dict (else rightly), reads the pictures as a tower does, remembers what it was asked."""

    def __init__(
        self, answers: dict[str, str] | None = None, name: str = "fake", fail_at: int | None = None
    ) -> None:
        self.answers, self.name, self.fail_at = answers or {}, name, fail_at
        self.batches: list[list[str]] = []
        self.pictures: list[int] = []
        self.largest_cache = 0

    def answer(self, samples: list[Sample], *, max_new_tokens: int, vision_cache: dict | None) -> list[str]:
        if self.fail_at is not None and len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        for sample in samples:
            key = tuple(ref.key for ref in sample.images)
            if key and key not in vision_cache:
                vision_cache[key] = Seen([ref.load() for ref in sample.images])
        self.largest_cache = max(self.largest_cache, len(vision_cache))
        self.batches.append([sample.id for sample in samples])
        self.pictures += [len(sample.images) for sample in samples]
        return [self.answers.get(sample.id, sample.meta["question"].answer) for sample in samples]

    def choose(self, samples: list[Sample], options: list[list[str]], *, vision_cache: dict | None) -> list[int]:
        texts = self.answer(samples, max_new_tokens=1, vision_cache=vision_cache)
        return [letters.index(text) if text in letters else 0 for letters, text in zip(options, texts, strict=True)]

    def token_count(self, texts: list[str]) -> int:
        return sum(len(text.split()) for text in texts)

    def footprint(self) -> dict[str, Any]:
        return {"weight_bytes": 4936, "dtype": "float32", "device": "cpu"}

    def parameter_count(self) -> dict[str, int]:
        return {"total": 1234, "active": 1000}

    def fingerprint(self) -> str:
        return self.name


@pytest.fixture
def benchmark_of() -> Callable[..., Benchmark]:
    def make(**changes) -> Benchmark:
        values = {
            "name": "tiny",
            "title": "tiny questions",
            "format": "jsonl",
            "root": "tiny",
            "split": "test",
            "prompt_style": "plain",
            "metric": "exact_match",
            "categories": ["modality", "kind"],
        }
        return Benchmark(**(values | changes))

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """30 questions on 10 pictures, and two without a picture."""
    root = tmp_path / "data" / "tiny"
    (root / "images").mkdir(parents=True)
    rows = []
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(root / "images" / f"{number}.png")
        for kind in ("red", "green", "blue"):
            question = f"How much {kind}{' really' * number} is there?"
            row = {
                "id": f"{kind}-{number}",
                "image": f"{number}.png",
                "question": question,
                "answer": str(number),
            }
            rows.append(row | {"categories": {"kind": kind}})
    rows += [
        {"id": f"text-{i}", "question": "Which number?", "answer": "7", "categories": {"kind": "text"}}
        for i in (0, 1)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (root / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def fake_tower() -> type[FakeTower]:
    return FakeTower

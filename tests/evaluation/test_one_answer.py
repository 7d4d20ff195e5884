"""With a real tower: neither batch size, order, resuming nor the cache changes an answer, and no picture is seen twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import FAMILIES, tiny_family, tiny_picture, tiny_tower

from mmkd.data.samples import Turn
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.evaluation.results import read_predictions
from mmkd.towers.tower import Tower
from mmkd.towers.vision_cache import VisionCache

WORDS = ["red", "what color is the round thing", "is it left of the square, or right?", "A B C"]
CARD = Benchmark(
    name="b", title="t", format="jsonl", root=".", split="test", prompt_style="short", metric="exact_match", max_new_tokens=5
)
LETTERS = CARD.model_copy(update={"prompt_style": "letter", "parser": "letter", "metric": "accuracy"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Fifteen questions: four on each of three pictures, two on two pictures, one on none; all with choices."""
    root = tmp_path_factory.mktemp("data")
    for number in range(3):
        tiny_picture(root / "images", f"{number}.png", number, ((20, 16), (16, 24), (16, 16))[number])
    rows = [{"image": f"{n}.png", "question": text} for n in range(3) for text in WORDS]
    rows += [{"images": ["0.png", "2.png"], "question": text} for text in WORDS[:2]] + [{"question": "no picture"}]
    fields = {"choices": ["red", "green", "blue"], "answer": 1}
    (root / "test.jsonl").write_text("\n".join(json.dumps(row | fields) for row in rows), encoding="utf-8")
    return root


def answers(tower: Tower, data: Path, out: Path, card: Benchmark = CARD, **options) -> dict[str, str]:
    evaluate(tower, card, out, data_root=data, progress=False, **{"batch_size": 4} | options)
    return {name: row["prediction"] for name, row in read_predictions(out / "predictions.jsonl").items()}


@pytest.fixture
def tower() -> Tower:
    return tiny_tower(vision="clip")


@pytest.mark.parametrize("choices", ["generation", "likelihood"])
def test_batches_and_cache_change_no_answer(tower: Tower, data: Path, tmp_path: Path, choices: str) -> None:
    card = CARD if choices == "generation" else LETTERS
    alone = answers(tower, data, tmp_path / "1", card, batch_size=1, cache_bytes=0, choices=choices)
    assert len(set(alone.values())) > 1
    for size, room in ((3, 0), (4, 2**20), (15, 2**20), (7, 300)):
        assert answers(tower, data, tmp_path / f"{size}", card, batch_size=size, cache_bytes=room, choices=choices) == alone


def test_the_order_of_the_file_changes_no_answer(tower: Tower, data: Path, tmp_path: Path) -> None:
    lines = (data / "test.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) | {"id": str(number)} for number, line in enumerate(lines)]
    found = []
    for name, order in (("forth", rows), ("back", rows[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "test.jsonl").write_text("\n".join(map(json.dumps, order)), encoding="utf-8")
        (folder / "images").symlink_to(data / "images")
        found.append(answers(tower, folder, folder / "out"))
    assert found[0] == found[1]


def test_stopped_and_resumed_is_as_in_one_go(tower: Tower, data: Path, tmp_path: Path, monkeypatch) -> None:
    whole, generate, calls = answers(tower, data, tmp_path / "whole"), tower.answer_with_likelihood, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(tower, "answer_with_likelihood", stop)
    with pytest.raises(KeyboardInterrupt):
        answers(tower, data, tmp_path / "stopped")
    assert answers(tower, data, tmp_path / "stopped") == whole


@pytest.mark.parametrize("name", ["clip", *FAMILIES])
def test_each_picture_is_decoded_and_seen_once(name: str, data: Path, tmp_path: Path, monkeypatch) -> None:
    tower = tiny_family(name) if name in FAMILIES else tiny_tower(vision=name)
    plain = answers(tower, data, tmp_path / "plain", batch_size=1, cache_bytes=0)
    seen, see = [], tower.see
    monkeypatch.setattr(tower, "see", lambda inputs: seen.append(sum(inputs.images)) or see(inputs))
    assert answers(tower, data, tmp_path / "once") == plain
    assert sum(seen) == 5  # three alone, and two that one question shows together


def test_the_cache_keeps_to_its_budget() -> None:
    class Value:
        nbytes = 40

    cache = VisionCache(100)
    for key in "abc":
        cache[(key,)] = Value()
    assert [key for (key,) in cache] == ["b", "c"] and cache.bytes == 80
    cache[("b",)] = Value()
    del cache[("c",)]
    assert list(cache) == [("b",)] and cache.bytes == 40
    cache.max_bytes = 10  # one value over the budget is kept alone: its batch needs it
    cache[("z",)] = Value()
    assert list(cache) == [("z",)]


def test_likelihood_is_that_of_the_letters_tokens(tower: Tower, data: Path) -> None:
    samples = [LETTERS.render(question) for question in LETTERS.read(data)]
    best = tower.choose(samples, [["A", "B", "C"]] * len(samples))
    assert len(set(best)) > 1
    for sample, place in zip(samples, best, strict=True):
        pieces = [tower.answer_tokens(sample, letter) for letter in "ABC"]
        differ = next(i for i, tokens in enumerate(zip(*pieces, strict=True)) if len(set(tokens)) > 1)
        inputs = tower.prepare([replace(sample, turns=(*sample.turns, Turn("assistant", "A")))])
        row = int(inputs.response[0].nonzero()[differ])
        logits = tower.head(tower.read(inputs, tower.see(inputs))[0, row])
        assert int(logits[[piece[differ] for piece in pieces]].argmax()) == place

"""Pairs of pictures and captions: numbering, what matches what, and where they are read from."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_picture

from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.retrieval.pairs import pair_set, read_pairs

FILES = {"field.question": "caption", "field.answer": "caption"}


@pytest.fixture
def root(tmp_path):
    rows = []
    for number, caption in enumerate(["a red cat", "A  red cat", "a dog"]):
        tiny_picture(tmp_path / "images", f"{number}.png", number)
        rows.append({"image": f"{number}.png", "caption": caption, "more": ["pet", "animal"]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def spec(root, **fields):
    return DataSpec(format="jsonl", root=str(root), **fields)


def test_captions_that_differ_in_case_are_one(root):
    pairs = read_pairs([spec(root, files=FILES)], 0)
    assert pairs.texts == ("a red cat", "a dog") and len(pairs.images) == 3
    assert pairs.pairs.tolist() == [[0, 0], [1, 0], [2, 1]]


def test_several_captions_of_a_picture(root):
    more = {"field.question": "caption", "field.answers": "more"}
    pairs = read_pairs([spec(root, files=FILES), spec(root, files=more)], 0)
    assert len(pairs) == 9 and len(pairs.images) == 3 and pairs.texts == ("a red cat", "a dog", "pet", "animal")
    assert pairs.relevance().sum() == 9


def test_a_match_need_not_be_in_the_batch(tmp_path):
    """Picture 0 has captions 0 and 1, picture 1 has caption 1: they match whichever pairs a batch holds."""
    a, b = (tiny_picture(tmp_path, f"{n}.png", n) for n in range(2))
    pairs = pair_set([(a, "x"), (a, "y"), (b, "y")])
    assert pairs.match(torch.tensor([0, 1]), torch.tensor([0, 1])).tolist() == [[True, True], [False, True]]
    assert torch.equal(pairs.match(torch.arange(2), torch.arange(2)), pairs.relevance())


def test_conversations_give_their_last_answer(root):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    (root / "talk.json").write_text(json.dumps([{"id": "1", "image": "0.png", "conversations": turns}]), encoding="utf-8")
    files = {"annotations": "talk.json", "images": "images"}
    pairs = read_pairs([DataSpec(format="llava", root=str(root), files=files)], 0)
    assert pairs.texts == ("a cat",) and pairs.images[0].name.endswith("0.png")


def test_errors(root):
    with pytest.raises(DataError, match=r"weight 2.0 .* take `weight` out"):
        read_pairs([spec(root, files=FILES, weight=2)], 0)
    (root / "blind.jsonl").write_text(json.dumps({"id": "q", "caption": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="'q' has 0 pictures"):
        read_pairs([spec(root, files=FILES, split="blind")], 0)

"""Retrieval benchmarks in Karpathy's layout, by a tiny dual encoder, against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_picture

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.evaluation.results import read_predictions, read_results
from mmkd.retrieval.assemble import TextSpec, assemble_dual
from mmkd.retrieval.benchmark import evaluate_retrieval, load_retrieval
from mmkd.retrieval.dual_encoders import TransformersDual
from mmkd.retrieval.text_tokenizer import train_text_tokenizer
from mmkd.towers.assemble import VisionSpec

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {"model_type": "vit", **SIZES, "image_size": 16, "patch_size": 8}
BERT = {"model_type": "bert", **SIZES, "max_position_embeddings": 32, "initializer_range": 0.3}
PICTURES = 9


@pytest.fixture(scope="module")
def model() -> TransformersDual:
    words = train_text_tokenizer(["a round red thing"], 260)
    return assemble_dual(VisionSpec(config=VIT, image_size=(16, 16)), TextSpec(config=BERT), embedding=8, tokenizer=words)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine test pictures with one to three captions, and one picture of another split."""
    root = tmp_path / "data" / "flickr30k"
    rows = []
    for number in range(PICTURES + 1):
        tiny_picture(root / "flickr30k-images", f"{number}.png", seed=number)
        captions = [{"raw": f" thing {number} {'x' * place}", "tokens": []} for place in range(1 + number % 3)]
        split = "test" if number < PICTURES else "val"
        rows.append({"filename": f"{number}.png", "imgid": number, "split": split, "sentences": captions})
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "flickr30k"}), encoding="utf-8")
    return tmp_path / "data"


def test_numbers_are_those_of_loops(model, data: Path, tmp_path: Path) -> None:
    card = load_retrieval("flickr30k")
    results = evaluate_retrieval(model, card, tmp_path / "out", data_root=data, batch_size=4)
    items = card.read(data)
    assert len(items) == PICTURES and results["captions"] == sum(len(item.captions) for item in items) == 18
    with torch.no_grad():
        pictures = model.embed_images(model.prepare_images([item.image.load() for item in items]))
        texts = [(n, text) for n, item in enumerate(items) for text in item.captions]
        captions = model.embed_texts(model.prepare_texts([text for _, text in texts]))
    scores = (pictures @ captions.T).tolist()
    owners = [owner for owner, _ in texts]
    ranks = {"image_to_text": [], "text_to_image": []}
    for n, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        ranks["image_to_text"].append(1 + next(place for place, i in enumerate(order) if owners[i] == n))
    for i, owner in enumerate(owners):
        column = [row[i] for row in scores]
        ranks["text_to_image"].append(1 + sorted(range(PICTURES), key=lambda n: -column[n]).index(owner))
    total = 0.0
    for way, found in ranks.items():
        for k in (1, 5, 10):
            expected = sum(rank <= k for rank in found) / len(found)
            total += 100 * expected
            assert results["retrieval"][f"recall@{k}_{way}"]["score"] == pytest.approx(expected), (way, k)
    assert results["rsum"] == pytest.approx(total)
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [row["rank"] for row in rows.values()] == ranks["image_to_text"] + ranks["text_to_image"]
    assert results["score"] == pytest.approx(sum(row["score"] for row in rows.values()) / len(rows))
    assert len({row["group"] for row in rows.values()}) == PICTURES
    assert read_results(tmp_path / "out" / "results.json") == results
    assert "9 pictures, the card expects 1000" in results["rows_difference"]


def test_a_batch_changes_no_rank(model, data: Path, tmp_path: Path) -> None:
    card = load_retrieval("flickr30k")
    for size in (1, 64):
        evaluate_retrieval(model, card, tmp_path / str(size), data_root=data, batch_size=size)
    first, second = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("1", "64"))
    assert first == second


def test_a_picture_that_cannot_be_read_is_counted(model, data: Path, tmp_path: Path) -> None:
    (data / "flickr30k" / "flickr30k-images" / "2.png").write_bytes(b"no picture")
    results = evaluate_retrieval(model, load_retrieval("flickr30k"), tmp_path / "out", data_root=data)
    assert (results["n_skipped"], results["captions"]) == (1, 15)
    assert results["skipped"] == {"image does not decode": 1}


def test_the_command(model, data: Path, tmp_path: Path, capsys) -> None:
    model.save(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--data-root", str(data), "--output", str(tmp_path / "out")]
    assert main([*command, "--benchmarks", "flickr30k", "--limit", "5"]) == 0
    assert "image to text: R@1" in capsys.readouterr().out
    assert read_results(tmp_path / "out" / "flickr30k" / "results.json")["pictures"] == 5
    for options, message in (
        (["flickr30k,pope"], "ask apart"),
        (["coco_5k"], "there is no .*dataset_coco.json"),
        (["flickr30k", "--blind"], "retrieval has no --blind"),
        (["flickr30k", "--split", "none"], "no picture in split 'none'"),
    ):
        assert main([*command, "--benchmarks", *options]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        with pytest.raises(DataError, match=message):
            raise DataError(error)

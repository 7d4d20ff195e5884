"""Ranking distillation: the step against published numbers, whole runs, resume, two processes, recipes and their errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_picture
from torch import nn
from transformers import BertConfig, BertModel

from mmkd.cli import main
from mmkd.errors import RecipeError
from mmkd.recipes.reading import load_recipe
from mmkd.retrieval.dual import train_text_tokenizer
from mmkd.retrieval.pairs import pair_set
from mmkd.retrieval.ranking import PairBatch, RankingModel, RankingTrainer
from mmkd.retrieval.recipe import RankingSpec, load_ranking_recipe

F64 = torch.float64
CAPTIONS = [f"{color} {shape}" for color in ("red", "green", "blue", "dark") for shape in ("circle", "square", "star", "cross")]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

CONV = {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv", "arguments": {"widths": [8, 16]}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # draws differ between processes
BERT = {"model_type": "bert", **SIZES, **NO_DROPOUT, "max_position_embeddings": 32}


# ---- one step --------------------------------------------------------------------------------------------------------


class Points(nn.Module):
    """A student whose pictures' embeddings are the similarities themselves, and its texts' the unit vectors."""

    def __init__(self, similarities: list[list[float]], temperature: float = 0.1):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(similarities))
        self.temperature = torch.tensor(temperature)

    def clamp_temperature(self) -> None:
        """The temperature is fixed."""

    def embed_images(self, inputs):
        return self.rows

    def embed_texts(self, inputs):
        return torch.eye(len(self.rows))


class Known:
    """Teacher scores that are given."""

    def __init__(self, scores: list[list[float]]):
        self.table = torch.tensor(scores)

    def scores(self, images, texts):
        return self.table[images, texts]


S = [[0.60, 0.45, 0.20], [0.35, 0.70, 0.40], [0.10, 0.30, 0.55]]
P = [[0.98, 0.40, 0.05], [0.30, 0.99, 0.55], [0.01, 0.70, 0.96]]


@pytest.fixture
def three(tmp_path):
    return pair_set([(tiny_picture(tmp_path, f"{n}.png", n), f"text {n}") for n in range(3)])


def step(pairs, **options):
    spec = RankingSpec(**{"candidates": 2, **options})
    model = RankingModel(Points(S), pairs, spec, Known(P))
    own = torch.arange(3)
    loss, log = model(PairBatch(own, own, {}, {}))
    return loss, {name: (total / count).item() for name, (total, count) in log.items()}, model


def test_C5_batch_in_both_directions(three):
    loss, means, _ = step(three)
    assert loss.item() == pytest.approx(0.5626710620, abs=1e-6)
    assert means["contrastive"] == pytest.approx(0.1314834365, abs=1e-6)
    assert means["cprd"] == pytest.approx(0.4311876255, abs=1e-6)
    assert means["valid_negatives"] == pytest.approx((1 + 2 + 1 + 1 + 2 + 1) / 6)


def test_weight_and_reductions(three):
    assert step(three, weight=3)[0].item() == pytest.approx(0.1314834365 + 3 * 0.4311876255, abs=1e-6)
    nothing, means, _ = step(three, threshold=0.8)
    assert nothing.item() == pytest.approx(0.1314834365, abs=1e-6) and means["valid_negatives"] == 0
    # threshold 0.6: only text 1 has a valid negative (picture 2, 0.70) and picture 2 (text 1, 0.70)
    sums, shared = step(three, threshold=0.6)[1]["cprd"], step(three, threshold=0.6, query_reduction="with_valid")[1]["cprd"]
    assert sums > 0 and shared == pytest.approx(3 * sums, rel=1e-6)
    assert step(three, include_easy=True, candidates=2)[1]["cprd"] == pytest.approx(step(three)[1]["cprd"])


def test_the_control_is_contrastive_alone(three):
    model, own = RankingModel(Points(S), three, RankingSpec()), torch.arange(3)
    loss, log = model(PairBatch(own, own, {}, {}))
    assert loss.item() == pytest.approx(0.1314834365, abs=1e-6) and list(log) == ["contrastive"]


def test_what_also_matches_is_no_negative(tmp_path):
    """Picture 0 and picture 1 share a caption: neither stands among the other's negatives."""
    refs = [tiny_picture(tmp_path, f"{n}.png", n) for n in range(3)]
    pairs = pair_set([(refs[0], "a"), (refs[1], "b"), (refs[2], "c"), (refs[0], "b")])
    own, asked = torch.arange(3), []

    class Watched(Known):
        def scores(self, images, texts):
            asked.append((images, texts))
            return super().scores(images, texts)

    RankingModel(Points(S), pairs, RankingSpec(candidates=2), Watched(P))(PairBatch(own, own, {}, {}))
    images, texts = asked[0]
    # picture 0 has one negative, the text "c"; the second place is empty and filled with whatever stands first
    assert (images[0, 0], texts[0, 0]) == (0, 2)
    assert {(int(i), int(t)) for i, t in zip(images[1], texts[1], strict=True)} == {(1, 0), (1, 2)}


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranking")
    for split, rows in {"train": CAPTIONS[:12], "test": CAPTIONS[8:]}.items():
        for number, _ in enumerate(rows):
            tiny_picture(folder / "data" / "images" / split, f"{number}.png", number, (16, 16))
        lines = [json.dumps({"image": f"{n}.png", "caption": caption}) + "\n" for n, caption in enumerate(rows)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"format": "jsonl", "root": "data", "files": {"field.question": "caption", "field.answer": "caption"}}
    training = {"optimiser": {"batch_size": 4, "learning_rate": 3e-3}, "steps": 6, "save_every": 2, "log_every": 2}
    common = {"data_root": str(folder), "data": [data], "training": training, "evaluation": {"data": [data | {"split": "test"}]}}
    blip = {
        "vision": {**SIZES, "image_size": 16, "patch_size": 8},
        "text": {**SIZES, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0},
        "vocab_size": 300, "embedding": 8,
    }
    student = {
        "vision": {"config": CONV, "image_size": 16},
        "text": {"config": BERT, "vocab_size": 300},
        "embedding": 8,
    }
    recipes = {
        "teacher": {"kind": "matching", "title": "t", "output": str(folder / "teacher"), "model": {"config": blip}, **common},
        "ranking": {
            "kind": "ranking", "title": "r", "output": "OUTPUT", "teacher": {"model": str(folder / "teacher" / "model")},
            "student": {"assemble": student}, "ranking": {"candidates": 3, "threshold": 0.0}, **common,
        },
    }
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert main(["rank", str(folder / "teacher.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    output = folder / "undisturbed" / "out"
    assert main(["rank", str(folder / "ranking.yaml"), f"output={output}"]) == 0
    return output


def weights(output: Path, role: str = "student") -> dict:
    return load_file(output / role / "model.safetensors")


def rows(output: Path, role: str) -> list[dict]:
    return [json.loads(line) for line in (output / "log" / f"{role}.jsonl").read_text().splitlines()]


def test_the_teacher_is_trained_and_scored(folder):
    summary = json.loads((folder / "teacher" / "summary.json").read_text())
    entry = summary["benchmarks"]["recall@10_both"]
    assert entry["n"] == 16 and 0 <= entry["teacher"] <= 1 and "student" not in entry
    found = rows(folder / "teacher", "model")
    assert {"contrastive", "matching", "matching_accuracy"} <= found[0].keys() and found[-1]["step"] == 6


def test_a_run_ends_in_a_comparison(undisturbed, folder, capsys):
    summary = json.loads((undisturbed / "summary.json").read_text())
    directions = ("image_to_text", "text_to_image", "both")
    assert set(summary["benchmarks"]) == {f"recall@{k}_{d}" for k in (1, 5, 10) for d in directions}
    for entry in summary["benchmarks"].values():
        for role in ("before", "control", "student", "teacher"):
            low, high = entry[f"{role}_ci95"]
            assert 0 <= low <= entry[role] <= high <= 1
        assert entry["student_minus_control"]["mean"] == pytest.approx(entry["student"] - entry["control"])
    assert set(summary["median_rank"]["both"]) == {"before", "control", "student", "teacher"}
    assert {"contrastive", "cprd", "valid_negatives"} <= rows(undisturbed, "student")[0].keys()
    assert all("cprd" not in row for row in rows(undisturbed, "control"))
    before = (undisturbed / "student" / "model.safetensors").stat().st_mtime_ns
    assert main(["rank", str(folder / "ranking.yaml"), f"output={undisturbed}"]) == 0  # everything is there already
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("before", "control", "student", "teacher", "median rank", "R@10: student"))
    assert (undisturbed / "student" / "model.safetensors").stat().st_mtime_ns == before
    assert not list(undisturbed.glob("stages/*")), "checkpoints of finished trainings are removed"


def test_weight_0_is_the_control(undisturbed, folder):
    output = folder / "weightless" / "out"
    assert main(["rank", str(folder / "ranking.yaml"), f"output={output}", "ranking.weight=0"]) == 0
    control, student, other = weights(output, "control"), weights(output), weights(undisturbed)
    for name in control:
        torch.testing.assert_close(control[name], student[name], rtol=0, atol=0)
    assert any(not torch.equal(student[name], other[name]) for name in other)
    assert all(torch.equal(control[name], weights(undisturbed, "control")[name]) for name in control)


def test_interrupted_and_started_again_ends_with_the_same_weights(undisturbed, folder, monkeypatch):
    output = folder / "resumed" / "out"
    command = ["rank", str(folder / "ranking.yaml"), f"output={output}", "control=false"]
    save = RankingTrainer._save_checkpoint

    def save_and_stop(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RankingTrainer, "_save_checkpoint", save_and_stop)
        assert main(command) == 130
    assert not (output / "student").exists()
    assert main(command) == 0
    expected, found = weights(undisturbed), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in rows(output, "student")] == [2, 4, 6]


def test_two_processes_are_one(undisturbed, folder):
    output = folder / "two" / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmkd.cli"]
    command = [*launch, "rank", str(folder / "ranking.yaml"), f"output={output}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for role in ("control", "student"):
        expected, found = weights(undisturbed, role), weights(output, role)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-4, atol=2e-5, msg=f"{role} {name}")
        for one, two in zip(rows(undisturbed, role), rows(output, role), strict=True):
            for key in set(one) & {"loss", "contrastive", "cprd", "valid_negatives"}:
                assert two[key] == pytest.approx(one[key], rel=1e-4), (role, one["step"], key)


def test_several_seeds_and_a_reranking_teacher(folder, capsys):
    output = folder / "seeds"
    overrides = [f"output={output}", "training.steps=2", "evaluation.rerank=2", "--seeds", "0,1"]
    assert main(["rank", str(folder / "ranking.yaml"), *overrides]) == 0
    result = json.loads((output / "seeds.json").read_text())
    assert result["seeds"] == [0, 1] and len(result["benchmarks"]["recall@10_both"]["student"]["values"]) == 2
    summaries = [json.loads((output / f"seed_{n}" / "summary.json").read_text()) for n in (0, 1)]
    assert summaries[0]["rerank"] == 2
    # a teacher that orders two candidates cannot find what the student has not among its first two
    ranks = json.loads((output / "seed_0" / "ranks.json").read_text())
    assert [r <= 2 for r in ranks["student"]["both"]] == [r <= 2 for r in ranks["teacher"]["both"]]


def test_a_frozen_text_encoder_is_kept_and_makes_another_control(undisturbed, folder):
    recipe, bert = folder / "pooled.yaml", folder / "bert"
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(CAPTIONS, 300)
    BertModel(BertConfig(**BERT, vocab_size=len(tokenizer))).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    raw = yaml.safe_load((folder / "ranking.yaml").read_text())
    trained = {}
    for frozen in (True, False):
        raw["student"]["assemble"]["text"] = {"source": str(bert), "pooling": "mean", "frozen": frozen}
        recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
        output = folder / "pooled" / str(frozen)
        assert main(["rank", str(recipe), f"output={output}"]) == 0
        start = load_file(bert / "model.safetensors")
        for role in ("control", "student"):
            found = weights(output, role)
            beneath = "text_model.encoder."
            kept = [torch.equal(found[beneath + name], start[name]) for name in start if not name.startswith("pooler")]
            assert all(kept) if frozen else not any(kept)
        trained[frozen] = weights(output, "control")["text_projection.weight"]
    assert not torch.equal(trained[True], trained[False]), "the two share no control"


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_all_errors_of_a_recipe_come_at_once(folder, tmp_path):
    raw = yaml.safe_load((folder / "ranking.yaml").read_text())
    raw["ranking"] = {"candidate": 3, "threshold": 2}
    raw["teacher"] = {"model": "x", "yes": "ja"}
    raw["training"].pop("steps")
    raw["student"]["assemble"]["text"]["frozen"] = True
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_ranking_recipe(path)
    message = str(caught.value)
    assert "5 errors" in message and "did you mean 'candidates'?" in message
    told = ("ranking.threshold", "yes: a matching head is asked nothing", "either `epochs` or `steps`", "`frozen` goes with")
    for words in told:
        assert words in message


def test_each_command_names_the_other(folder, capsys):
    with pytest.raises(RecipeError, match="mmkd rank"):
        load_recipe(folder / "ranking.yaml")
    plain = Path(__file__).parents[2] / "scripts" / "recipes" / "quickstart.yaml"
    assert main(["rank", str(plain)]) == 2
    assert "says no `kind`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("ranking", "training.optimiser.batch_size=13", "12 pairs, fewer than batch_size 13"),
        ("ranking", "teacher.model=nowhere", "no cross-encoder can be loaded from 'nowhere'"),
        ("teacher", "evaluation.rerank=3", "has no student whose order could be reranked"),
    ],
)
def test_mistakes_are_one_message(folder, tmp_path, capsys, name, override, words):
    assert main(["rank", str(folder / f"{name}.yaml"), f"output={tmp_path / 'out'}", override]) == 2
    assert words in capsys.readouterr().err

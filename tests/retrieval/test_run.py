"""Whole runs of `mmkd rank`: comparison, resume, two processes, seeds, recipes and their errors."""

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
from transformers import BertConfig, BertModel, Trainer

from mmkd.base.distributed import alone_in
from mmkd.cli import main
from mmkd.errors import RecipeError, RegistryError
from mmkd.recipes.reading import load_recipe
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.retrieval.text_tokenizer import train_text_tokenizer
from mmkd.retrieval.trainer import PairTrainer

CAPTIONS = [f"{color} {shape}" for color in ("red", "green", "blue", "dark") for shape in ("circle", "square", "star", "cross")]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

CONV = {"model_type": "mmkd_encoder", "source": "module", "architecture": "conv", "arguments": {"widths": [8, 16]}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # draws differ between processes
BERT = {"model_type": "bert", **SIZES, **NO_DROPOUT, "max_position_embeddings": 32}


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


@pytest.mark.parametrize("marked", [True, False])
def test_interrupted_and_started_again_ends_with_the_same_weights(undisturbed, folder, monkeypatch, marked):
    """After a checkpoint, and while one is written: without its mark it is not used."""
    output = folder / f"resumed_{marked}" / "out"
    command = ["rank", str(folder / "ranking.yaml"), f"output={output}", "control=false"]
    save, resumed = PairTrainer._save_checkpoint, []

    def save_and_stop(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 4:
            if not marked:
                (Path(self.args.output_dir) / "checkpoint-4" / "complete").unlink()
            raise KeyboardInterrupt

    def train(self, resume_from_checkpoint=None):
        resumed.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return Trainer.train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(PairTrainer, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(PairTrainer, "_save_checkpoint", save_and_stop)
        assert main(command) == 130
    assert not (output / "student").exists()
    assert main(command) == 0
    assert resumed == [None, "checkpoint-4" if marked else "checkpoint-2"]
    expected, found = weights(undisturbed), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row["step"] for row in rows(output, "student")] == [2, 4, 6]


def test_a_second_run_into_the_same_folder_is_refused(undisturbed, folder, capsys):
    with alone_in(undisturbed, "it"):
        assert main(["rank", str(folder / "ranking.yaml"), f"output={undisturbed}"]) == 2
    assert "another run is writing the same output" in capsys.readouterr().err


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


def test_a_module_of_the_recipe_is_imported_before_the_rest_is_checked(folder, tmp_path):
    raw = yaml.safe_load((folder / "ranking.yaml").read_text())
    (tmp_path / "my_ranking_module.py").write_text("imported = True\n", encoding="utf-8")
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(raw | {"imports": ["my_ranking_module"]}), encoding="utf-8")
    assert load_ranking_recipe(path).imports == ["my_ranking_module"]
    assert sys.modules.pop("my_ranking_module").imported
    assert "imports" not in load_ranking_recipe(folder / "ranking.yaml").model_dump()  # runs of before stay what they are
    path.write_text(yaml.safe_dump(raw | {"imports": ["no_such_module"], "seed": "x"}), encoding="utf-8")
    with pytest.raises(RegistryError, match="no_such_module"):
        load_ranking_recipe(path)
    path.write_text(yaml.safe_dump(raw | {"imports": "my_ranking_module"}), encoding="utf-8")
    with pytest.raises(RecipeError, match="imports: Input should be a valid list"):
        load_ranking_recipe(path)


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

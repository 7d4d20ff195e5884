"""`mmkd check RUN/not_finite` puts a kept batch through the towers again and says where it stops being finite."""

import json

import pytest
import yaml
from tiny import language_config, tiny_picture, tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.testing.replay import replay


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run whose teacher has finite weights and logits that are not."""
    folder = tmp_path_factory.mktemp("replay")
    import torch

    teacher = tiny_tower(5, language=language_config(tie_word_embeddings=False))
    with torch.no_grad():
        teacher.head.weight.mul_(1e38)
    teacher.save(folder / "teacher")
    tiny_tower(6, tokenizer=teacher.tokenizer).save(folder / "student")
    with (folder / "train.jsonl").open("w") as file:
        for number in range(6):
            tiny_picture(folder, f"{number}.png", number)
            file.write(json.dumps({"image": f"{number}.png", "question": f"what is {number}?", "answer": "red"}) + "\n")
    content = {
        "title": "t", "output": str(folder / "out"), "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")}, "control": False,
        "guards": {"teacher_is_better": False, "pixels_matter": False, "samples": 2},
        "stages": {"only": {
            "data": [{"format": "jsonl", "root": str(folder), "prompt": "plain"}], "steps": 2,
            "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}, "optimiser": {"batch_size": 3},
        }},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_the_guards_stop_a_teacher_without_finite_answers_with_code_3(stopped, capsys):
    assert main(["distill", str(stopped / "recipe.yaml")]) == 3
    assert "not finite (teacher_loss)" in capsys.readouterr().err
    assert not (stopped / "out" / "student").exists()


def test_a_step_is_stopped_kept_and_replayed(stopped, monkeypatch, capsys):
    monkeypatch.setattr("mmkd.runs.stages.run_guards", lambda *arguments: {})
    assert main(["distill", str(stopped / "recipe.yaml")]) == 3
    err = capsys.readouterr().err
    assert "student, stage only, step 1: not finite: kl" in err and "mmkd check" in err
    assert not (stopped / "out" / "student").exists() and not list((stopped / "out").rglob("checkpoint-*"))
    assert main(["check", str(stopped / "out" / "not_finite")]) == 3
    ((place, facts),) = json.loads(capsys.readouterr().out).items()
    assert place.endswith("student_only_step1") and facts["finite"] is False and facts["weights"] == "as before the step"
    assert facts["batch 0"]["kl"] != facts["batch 0"]["kl"], "NaN again"
    assert facts["batch 0"]["cross_entropy"] > 0 and len(facts["samples"]) == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"role": 1}', "\x00"])
def test_a_damaged_report_is_one_line(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match="no report of a step") as caught:
        replay(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_kept_is_said(tmp_path, capsys):
    (tmp_path / "not_finite").mkdir()
    assert main(["check", str(tmp_path / "not_finite")]) == 2
    assert "holds no step that was kept" in capsys.readouterr().err

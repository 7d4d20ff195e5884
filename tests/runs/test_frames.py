"""How far it is from the command to the gradient of a row: a short path can be read."""

import inspect
import json
from pathlib import Path

from tiny import tiny_picture, tiny_tokenizer, tiny_tower

import mmkd
from mmkd.cli import main
from mmkd.losses import ForwardKL

MOST = 12  # frames of our own, the entry point `mmkd` among them


def test_from_the_command_to_the_gradient_of_a_row(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    tiny_tower(1, 16, tokenizer=tokenizer).save(tmp_path / "student")
    tiny_tower(2, 32, tokenizer=tokenizer).save(tmp_path / "teacher")
    rows = [{"id": str(i), "image": f"{i}.png", "question": "what?", "answer": "red"} for i in range(4)]
    for i in range(4):
        tiny_picture(tmp_path, f"{i}.png", i)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = {
        "title": "t", "output": str(tmp_path / "out"), "control": False, "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"model": str(tmp_path / "student")}, "guards": {"pixels_matter": False, "teacher_is_better": False},
        "stages": {"one": {
            "data": [{"format": "jsonl", "root": str(tmp_path)}], "terms": {"forward_kl": 1}, "steps": 1,
            "optimiser": {"batch_size": 4},
        }},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    seen, closed = [], ForwardKL.value_and_grad

    def watched(self, *arguments):
        own = Path(mmkd.__file__).parent
        frames = [f for f in inspect.stack()[1:] if own in Path(f.filename).parents]
        seen.append([f"{Path(f.filename).relative_to(own)}:{f.function}" for f in frames])
        return closed(self, *arguments)

    monkeypatch.setattr(ForwardKL, "value_and_grad", watched)
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 0
    of_training = [path for path in seen if any("compute_loss" in frame for frame in path)]
    assert of_training and "cli/__init__.py:main" in of_training[0]
    # `value_and_grad` itself and `mmkd.cli.run`, which calls `main`, come on top.
    assert all(len(path) + 2 <= MOST for path in of_training), "\n".join(of_training[0])

"""Rounds: write, train, score on validation, again, until it stalls or nothing new is written."""

import json

import pytest
import yaml
from tiny import tiny_picture, tiny_tower

from mmkd.base.checksums import hash_of
from mmkd.errors import DataError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.run import distill
from mmkd.writing.authors import LiveAuthor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rounds")
    teacher = tiny_tower(5, 16)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    tiny_picture(root, "a.png", 0)
    rows = [{"image": "a.png", "question": f"what is {n}?", "answer": "red"} for n in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What authors were asked, and answers that `say` gives."""
    found = []

    def texts(author, requests, prompts):
        found.extend((author.name, request.sample.turns[-1].text) for request in requests)
        return [(asked.say(author, request), True) for request in requests]

    asked.say = lambda author, request: f"{author.name} says {request.id}"
    monkeypatch.setattr(LiveAuthor, "_texts", texts)
    asked.found = found
    return asked


def raw_of(folder, output, **rounds):
    data = {"format": "jsonl", "root": str(folder)}
    wrong = {"kind": "write", "by": "student", "prompt": {"prompt": "{{ question }}", "row": {"answer": "{{ answer }}"}},
             "data": [data], "checks": [{"reference": {"be": "different"}}]}  # fmt: skip
    card = {"prompt": "{{ context.hard.number }} wrong. {{ question }}", "row": {"question": "again: {{ question }}"}}
    new = {"kind": "write", "by": "teacher", "data": [{"from": "wrong"}], "context": {"hard": "wrong"}, "prompt": card}
    optimiser = {"batch_size": 4, "learning_rate": 0.1}
    learn = {"data": [data, {"from": "new"}], "steps": 2, "optimiser": optimiser, "terms": {"cross_entropy": 1.0}}
    first = {**learn, "data": [data]}
    return {
        "title": "t", "output": str(output),
        "teacher": {"model": str(folder / "teacher")}, "student": {"model": str(folder / "student")},
        "stages": {"first": first, "wrong": wrong, "new": new, "learn": learn}, "controls": False,
        "guards": {"pixels_matter": False, "teacher_is_better": False},
        "rounds": {"stages": ["wrong", "new", "learn"], "times": 3, **rounds},
    }  # fmt: skip


def recipe_of(*arguments, **keys):
    return validate(raw_of(*arguments, **keys), "test", Recipe)


def weights(folder):
    return hash_of(folder / "model.safetensors")


def test_rounds_are_written_out(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run")
    assert list(recipe.stages) == ["first", "learn", "learn_2", "learn_3"]
    assert [(name, spec.before) for name, spec in recipe.writes.items()] == [
        (f"{name}{number}", f"learn{number}") for number in ("", "_2", "_3") for name in ("wrong", "new")
    ]
    assert [entry.from_ for entry in recipe.stages["learn_2"].data] == [None, "new_2"]
    assert recipe.writes["new_2"].data[0].from_ == "wrong_2" and recipe.writes["new_2"].context == {"hard": "wrong_2"}
    kept = recipe_of(folder, tmp_path / "run", keep=True)
    assert [entry.from_ for entry in kept.stages["learn_3"].data] == [None, "new", "new_2", "new_3"]
    assert [entry.from_ for entry in kept.writes["new_3"].data] == ["wrong_3"]
    again = validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)), "recorded", Recipe)
    assert again.writes == recipe.writes and again.stages == recipe.stages


def test_each_round_asks_the_student_of_the_round_before(folder, tmp_path, asked):
    recipe = recipe_of(folder, tmp_path / "run", times=2)
    distill(recipe)
    # In round 2 the teacher would be asked the same, which it has answered.
    assert [name for name, _ in asked.found] == ["student"] * 8 + ["teacher"] * 8 + ["student"] * 8
    assert asked.found[8] == ("teacher", "8 wrong. what is 0?")
    last = tmp_path / "run" / "stages" / "student" / "2_learn_2" / "model"
    assert weights(tmp_path / "run" / "student") == weights(last)
    distill(recipe)
    assert len(asked.found) == 24
    assert len(list((tmp_path / "written").glob("wrong*"))) == 2


@pytest.mark.parametrize(("scores", "runs", "best"), [((0.5, 0.4), 2, 1), ((0.4, 0.5, 0.5), 3, 2)])
def test_until_it_stalls_takes_the_best_round(folder, tmp_path, monkeypatch, scores, runs, best):
    given = list(scores)
    monkeypatch.setattr("mmkd.runs.rounds.validation_scores", lambda *arguments: {"bench": given.pop(0)})
    recipe = recipe_of(folder, tmp_path / "run")
    recipe = recipe.model_copy(update={"rounds": recipe.rounds.model_copy(update={"until": "stall"})})
    for _ in range(2):  # a run that goes on scores nothing again
        distill(recipe)
        assert not given
    trained = sorted((tmp_path / "run" / "stages" / "student").glob("*_learn*"))
    assert len(trained) == runs
    assert weights(tmp_path / "run" / "student") == weights(trained[best - 1] / "model")


def test_a_student_without_mistakes_ends_the_rounds(folder, tmp_path, asked):
    asked.say = lambda author, request: "red" if author.name == "student" and len(asked.found) > 20 else "blue"
    distill(recipe_of(folder, tmp_path / "run"))
    assert [path.name for path in sorted((tmp_path / "run" / "stages" / "student").iterdir())][:2] == ["0_first", "1_learn"]
    assert not (tmp_path / "run" / "stages" / "student" / "3_learn_3" / "model").exists()
    assert (tmp_path / "run" / "student").is_dir()


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        ({"stages": ["wrong", "lern"]}, "rounds.stages: there is no stage 'lern'; did you mean 'learn'"),
        ({"stages": ["wrong", "learn"]}, "do not stand one after another"),
        ({"stages": ["wrong", "new"]}, "none of them trains"),
        ({"until": "stall"}, "rounds.until: give evaluation.benchmarks and evaluation.validation"),
        ({"times": 0}, "times"),
        ({"until": "stalls"}, "until"),
    ],
)  # fmt: skip
def test_mistakes_are_said(folder, tmp_path, rounds, told):
    with pytest.raises(DataError) as caught:
        recipe_of(folder, tmp_path / "run", **rounds)
    assert told in str(caught.value)

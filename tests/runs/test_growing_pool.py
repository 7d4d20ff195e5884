"""CoMD (`comd_assessor.yaml`): the pool grows by what was hard, and a student that does not trail ends the rounds."""

import json
from pathlib import Path

import pytest
from tiny import tiny_picture, tiny_tower

from mmkd.recipes.reading import load_recipe
from mmkd.runs.run import distill
from mmkd.writing.authors import LiveAuthor

RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "write" / "comd_assessor.yaml"
COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("comd")
    teacher = tiny_tower(5, 16)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    for n in range(2):
        tiny_picture(root, f"{n}.png", n)
    rows = [{"image": f"{n % 2}.png", "question": f"what is in place {n}?"} for n in range(COUNT)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def speak(monkeypatch, student):
    """Authors that answer, assess (by whether both say the same) and write instructions. student: (question, round) -> answer."""
    asked = []

    def say(author, request):
        text = request.sample.turns[-1].text
        asked.append((author.name, text))
        if "Score each answer" in text:
            first, second = (text.split(f"Answer {name}: ")[1].split("\n")[0] for name in "AB")
            return json.dumps({"teacher": 8, "student": 8 if first == second else 6})
        if "Write one new instruction" in text:
            old = text.split("\n")[1].rstrip("?").split()[-1]
            return json.dumps({"instruction": f"which colour stands beside {old}{'again' * request.number} there, on the left?"})
        return student(text) if author.name == "student" else f"it is {text.split()[-1]}"

    monkeypatch.setattr(LiveAuthor, "_texts", lambda author, asked, prompts: [(say(author, one), True) for one in asked])
    return asked


def recipe_of(folder, output, *changes):
    data = {"format": "jsonl", "root": str(folder)}
    short = [f"stages.{name}.{key}={value}" for name in ("first", "learn")
             for key, value in (("steps", 2), ("epochs", "null"), ("precision", "float32"), ("gradient_checkpointing", "false"),
                                ("optimiser.batch_size", 4), ("optimiser.micro_batch_size", 4))]  # fmt: skip
    return load_recipe(RECIPE, [
        f"output={output}", f"teacher={{model: {folder / 'teacher'}}}", f"student={{model: {folder / 'student'}}}",
        f"stages.answers.data={json.dumps([data])}", *short, "rounds.times=2", "controls=false", "max_length=2048",
        "evaluation={benchmarks: []}", "guards={pixels_matter: false, teacher_is_better: false}", *changes,
    ])  # fmt: skip


def written(folder, name):
    (found,) = (path for path in (folder / "written").iterdir() if path.name.rpartition("-")[0] == name)
    return [json.loads(line) for line in (found / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_pool_grows_by_the_hard_instructions_times_the_ratio(folder, tmp_path, monkeypatch, ratio):
    """The student is wrong on places 0 to 2, and on half of what is written of them."""
    hard = {f"what is in place {n}?" for n in range(3)}
    asked = speak(monkeypatch, lambda text: "no" if text in hard or "beside 1" in text else f"it is {text.split()[-1]}")
    several = [f"stages.new.samples={ratio}", "stages.new.temperature=0.7"] if ratio > 1 else []
    distill(recipe_of(folder, tmp_path / "run", *several))
    found = {name: written(tmp_path, name) for name in ("tries", "hard", "new", "new_answers", "tries_2", "hard_2", "new_2")}
    assert {row["question"] for row in found["hard"]} == hard
    assert all(
        row["answer"] == f"it is {row['question'].split()[-1]}" for row in found["hard"]
    )  # the teacher's, not the student's
    assert len(found["new"]) == len(found["new_answers"]) == 3 * ratio
    assert len(found["tries"]) == COUNT and len(found["tries_2"]) == COUNT + 3 * ratio
    assert len(found["hard_2"]) == 3 + ratio  # what is still hard, and what of the new ones is
    assert ("student", "which colour stands beside 1 there, on the left?") in asked
    assert (tmp_path / "run" / "student").is_dir()


def test_a_student_that_answers_as_its_teacher_ends_the_rounds(folder, tmp_path, monkeypatch):
    asked = speak(monkeypatch, lambda text: f"it is {text.split()[-1]}")
    distill(recipe_of(folder, tmp_path / "run"))
    assert not any("Write one new instruction" in text for _, text in asked)
    trained = sorted(path.name for path in (tmp_path / "run" / "stages" / "student").iterdir() if (path / "model").is_dir())
    assert trained == ["0_first", "1_learn"]  # round 1 learns from the pool once more, and there is no round 2
    assert (tmp_path / "run" / "student").is_dir()


def test_the_rounds_read_the_pool_of_those_before(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", "rounds.times=3")
    read = {name: [entry.from_ for entry in spec.data] for name, spec in {**recipe.writes, **recipe.stages}.items()}
    assert [read[f"tries{n}"] for n in ("", "_2", "_3")] == [
        ["answers"], ["answers", "new_answers"], ["answers", "new_answers", "new_answers_2"]
    ]  # fmt: skip
    assert read["learn_3"] == ["answers", "new_answers", "new_answers_2", "new_answers_3"] and read["hard_3"] == ["tries_3"]
    last = recipe_of(folder, tmp_path / "run", "rounds.times=3", "rounds.keep=false")
    assert [entry.from_ for entry in last.writes["tries_3"].data] == ["answers", "new_answers_2"]

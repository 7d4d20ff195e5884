"""Recipes with write stages: written once, learnt from, checked before anything runs, resumable."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_picture, tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.recipes.reading import load_recipe, validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.control import control_recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.plan import plan
from mmkd.runs.run import distill
from mmkd.runs.towers import load_teachers
from mmkd.runs.write_cache import write_cache
from mmkd.runs.writes import with_written
from mmkd.writing.authors import LiveAuthor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight questions with a label and twelve without, on three pictures."""
    root = tmp_path_factory.mktemp("writes")
    teacher = tiny_tower(5, 16)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    for n in range(3):
        tiny_picture(root, f"{n}.png", n)
    labelled = [{"image": f"{n % 3}.png", "question": f"what is {n}?", "answer": "red"} for n in range(8)]
    open_ones = [{"image": f"{n % 3}.png", "question": f"and what is {n}?"} for n in range(12)]
    for name, rows in (("labelled", labelled), ("open", open_ones)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def fluent(monkeypatch):
    """Random towers never end an answer; these answer in words and say which prompt they had."""
    asked = []

    def texts(author, requests, prompts):
        asked.extend((author.name, request.id) for request in requests)
        return [(f"{author.name} says {request.id.split('-')[-1]}", True) for request in requests]

    monkeypatch.setattr(LiveAuthor, "_texts", texts)
    return asked


def entry(folder, name):
    return {"format": "jsonl", "root": str(folder), "files": {"annotations": f"{name}.jsonl"}}


def raw_of(folder, output, stages=None, **keys):
    write = {"kind": "write", "by": "teacher", "prompt": {"prompt": "Q: {{ question }}"}, "data": [entry(folder, "open")]}
    train = {"steps": 2, "optimiser": {"batch_size": 4}, "terms": {"cross_entropy": 1.0}}
    made = {
        "ask": {**write, **(stages or {}).get("ask", {})},
        **{name: {**write, **stage} for name, stage in (stages or {}).items() if name not in ("ask", "learn", "again")},
        "learn": {**train, "data": [entry(folder, "labelled"), {"from": "ask"}], **(stages or {}).get("learn", {})},
    }
    towers = {role: {"model": str(folder / role)} for role in ("teacher", "student")}
    guards = {"pixels_matter": False, "teacher_is_better": False}
    return {"title": "t", "output": str(output), **towers, "stages": made, "guards": guards, **keys}


def recipe_of(*arguments, **keys):
    return validate(raw_of(*arguments, **keys), "test", Recipe)


def test_what_the_teacher_wrote_is_what_is_learnt(folder, tmp_path, fluent):
    recipe = recipe_of(folder, tmp_path / "run")
    assert list(recipe.stages) == ["learn"] and recipe.writes["ask"].before == "learn"
    teachers = load_teachers(recipe)
    found = with_written(recipe, teachers, None)
    samples = stage_samples(found, found.stages["learn"])
    assert [sample.answer for sample in samples] == ["red"] * 8 + [f"teacher says {n}" for n in range(12)]
    assert samples[8].turns[0].text == "and what is 0?" and samples[8].images
    assert with_written(recipe, teachers, None) == found and len(fluent) == 12


def test_a_run_writes_trains_and_goes_on_without_asking_again(folder, tmp_path, fluent):
    recipe = recipe_of(folder, tmp_path / "run", controls=["equal_steps"])
    distill(recipe)
    assert len(fluent) == 12 and (tmp_path / "run" / "student").is_dir() and (tmp_path / "run" / "control").is_dir()
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert list(recorded["writes"]) == ["ask"] and recorded["stages"]["learn"]["data"][1]["from"] == "ask"
    assert validate(recorded | {"title": "t", "output": str(tmp_path / "run")}, "again", Recipe).writes == recipe.writes
    distill(recipe)
    distill(recipe_of(folder, tmp_path / "seed1", seed=1, controls=False))
    assert len(fluent) == 12  # asked once for all runs beside one another


def test_controls_learn_from_labels_alone_but_for_hard_answers(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", controls=["equal_steps", "hard_answers"])
    teachers = load_teachers(recipe)
    found = with_written(recipe, teachers, None)
    own = control_recipe(found, found.controls["equal_steps"])
    assert {sample.answer for sample in stage_samples(own, own.stages["learn"])} == {"red"} and not own.writes
    hard = control_recipe(found, found.controls["hard_answers"])
    assert len(stage_samples(hard, hard.stages["learn"])) == 20


def test_stages_read_one_another(folder, tmp_path, fluent):
    """Asked by the teacher, verified by the student: rows are kept where the student says something else."""
    verify = {
        "by": "student", "data": [{"from": "ask"}], "checks": [{"reference": {"be": "different"}}],
        "prompt": {"prompt": "{{ question }}", "row": {"answer": "{{ answer }}"}},
    }  # fmt: skip
    stages = {"hard": verify, "learn": {"data": [{"from": "hard"}]}}
    recipe = recipe_of(folder, tmp_path / "run", stages, controls=["hard_answers"])
    distill(recipe)
    assert [name for name, _ in fluent] == ["teacher"] * 12 + ["student"] * 12
    (written,) = (tmp_path / "written").glob("hard-*")
    rows = [json.loads(line) for line in (written / "train.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"teacher says {n}" for n in range(12)]  # the verified answer, not the verifier's


def test_a_student_that_was_trained_writes_for_the_stage_after_it(folder, tmp_path, fluent):
    write = {"kind": "write", "by": "student", "prompt": {"prompt": "Q: {{ question }}"}, "data": [entry(folder, "open")]}
    raw = raw_of(folder, tmp_path / "run", {"learn": {"data": [entry(folder, "labelled")]}}, controls=False)
    learn, ask = raw["stages"]["learn"], raw["stages"].pop("ask")
    raw["stages"] = {"learn": learn, "own": write, "ask": ask, "last": {**learn, "data": [{"from": "own"}, {"from": "ask"}]}}
    distill(validate(raw, "test", Recipe))
    assert [name for name, _ in fluent] == ["teacher"] * 12 + ["student"] * 12
    assert len(list((tmp_path / "written").glob("own-*/train.jsonl"))) == 1
    raw["controls"] = ["hard_answers"]
    with pytest.raises(DataError, match="what stage own writes depends on the trained student"):
        plan(validate(raw, "test", Recipe))


def test_context_tells_what_another_stage_kept(folder, tmp_path, monkeypatch):
    seen = []
    texts = LiveAuthor._texts

    def watched(self, asked, prompts):
        seen.extend(request.sample.turns[-1].text for request in asked)
        return texts(self, asked, prompts)

    monkeypatch.setattr(LiveAuthor, "_texts", watched)
    prompt = "{{ context.before.number }} rows, first {{ context.before.rows[0].answer }}. {{ question }}"
    again = {"context": {"before": "ask"}, "per": "picture", "prompt": {"prompt": prompt}}
    recipe = recipe_of(folder, tmp_path / "run", {"more": again, "learn": {"data": [{"from": "more"}]}})
    with_written(recipe, load_teachers(recipe), None)
    assert seen[12:] == [f"12 rows, first teacher says 0. and what is {n}?" for n in range(3)]


def test_a_cache_is_of_what_was_written(folder, tmp_path):
    stages = {"learn": {"terms": {"cross_entropy": 1.0, "forward_kl": 1.0}}}
    recipe = recipe_of(folder, tmp_path / "run", stages, controls=False)
    facts = write_cache(recipe, tmp_path / "cache", batch_size=8)
    assert facts["read"] == 20
    teacher = recipe.teacher.model_copy(update={"cache": str(tmp_path / "cache")})
    distill(recipe.model_copy(update={"teacher": teacher}))  # a sample that is not in the cache would end it
    assert (tmp_path / "run" / "student").is_dir()


# ---- before anything runs -------------------------------------------------------------------------------------------------


def test_the_plan_knows_write_stages_and_asks_nothing(folder, tmp_path, fluent):
    text = plan(recipe_of(folder, tmp_path / "run"))
    assert "stage ask writes: teacher answer 12 samples, before stage learn" in text
    assert "checks instructions, length, overlap" in text and "from ask, before it is written: 12 samples" in text
    assert not fluent and not (tmp_path / "written").exists()


WRONG = {
    "by": ({"ask": {"by": "techer"}}, "stages.ask.by: there is no teacher 'techer'; did you mean"),
    "card": ({"ask": {"prompt": "as_askd"}}, "there is no card 'as_askd'"),
    "template": ({"ask": {"prompt": {"prompt": "{{ question"}}}, "is no template"),
    "check": ({"ask": {"checks": ["lenght"]}}, "there is no check 'lenght'; did you mean"),
    "option": ({"ask": {"checks": [{"length": {"maximum": 3}}]}}, "length has no option 'maximum'"),
    "form": ({"ask": {"form": "jsn"}}, "there is no form of answers 'jsn'"),
    "row": ({"ask": {"form": {"json": {"fields": {"x": "text"}}}}}, "the form json gives x; say which is the answer"),
    "samples": ({"ask": {"samples": 3}}, "all would be the same; raise temperature"),
    "from": ({"learn": {"data": [{"from": "aks"}]}}, "no write stage 'aks' stands before it; did you mean 'ask'"),
    "with": ({"learn": {"data": [{"from": "ask", "split": "val", "root": "x"}]}}, "from: root cannot go with it"),
    "context": ({"ask": {"context": {"x": "later"}}}, "no write stage 'later' stands before it"),
    "key": ({"ask": {"tempature": 1}}, "stages.ask.tempature: unknown key; did you mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_said_where_they_were_written(folder, tmp_path, name):
    stages, told = WRONG[name]
    with pytest.raises(DataError) as caught:
        recipe_of(folder, tmp_path / "run", stages)
    assert told in str(caught.value)


def test_all_findings_come_at_once_before_anything_is_asked(folder, tmp_path, fluent):
    stages = {
        "ask": {"prompt": {"prompt": "{{ told.x }}"}, "checks": ["agreement"]}, "more": {"checks": [{"judge": {"by": "nobody"}}]},
        "learn": {"optimiser": {"batch_size": 50}},
    }  # fmt: skip
    recipe = recipe_of(folder, tmp_path / "run", stages)
    for run in (plan, distill):
        with pytest.raises(DataError) as caught:
            run(recipe)
        told = str(caught.value)
        assert "stages.ask.checks.agreement" in told and "stages.ask.prompt: no prompt can be made" in told
        assert "stages.more.checks.judge" in told
    assert not fluent and not (tmp_path / "written").exists()


def test_a_stage_that_keeps_nothing_ends_the_run_with_what_was_dropped(folder, tmp_path):
    alone = {"learn": {"data": [{"from": "ask"}]}}
    recipe = recipe_of(folder, tmp_path / "run", {"ask": {"checks": [{"length": {"max": 1}}]}, **alone}, controls=False)
    with pytest.raises(DataError, match=r"kept none of 12 answers.*length: 12 answer too long.*dropped.jsonl"):
        distill(recipe)


def test_a_stage_with_other_data_learns_from_them_and_that_is_said(folder, tmp_path, caplog):
    distill(recipe_of(folder, tmp_path / "run", {"ask": {"checks": [{"length": {"max": 1}}]}}, controls=False))
    assert "stage ask kept none of 12 answers; stage learn learns from its other data" in caplog.text


def test_write_stages_need_a_stage_that_reads_them(folder, tmp_path):
    raw = raw_of(folder, tmp_path / "run", {"learn": {"data": [entry(folder, "labelled")]}})
    raw["stages"]["late"] = raw["stages"].pop("ask")
    with pytest.raises(DataError, match="stages.late: no stage that trains comes after it"):
        validate(raw, "test", Recipe)


def test_the_command_writes_without_training_and_says_what_was_kept(folder, tmp_path, capsys, fluent):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_of(folder, tmp_path / "run")))
    for _ in range(2):
        assert main(["write", str(path), "stages.ask.checks=[{length: {max: 5}}]"]) == 0
    out = capsys.readouterr().out
    assert out.count("12 answers to 12 prompts, 12 kept") == 2 and len(fluent) == 12 and not (tmp_path / "run").exists()
    (written,) = (tmp_path / "written").glob("ask-*")
    assert str(written) in out and Path(written, "README.md").is_file()
    assert main(["write", str(path), "--stages", "aks"]) == 2
    assert load_recipe(path).writes["ask"].authors == ("teacher",)

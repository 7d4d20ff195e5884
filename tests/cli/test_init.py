"""`mmkd init`: what it sees of data, recipes that a dry run accepts, pairs by name, recipes that mmkd brings."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from tiny import tiny_picture, tiny_tower

from mmkd.cli import main
from mmkd.data.detect import detect
from mmkd.errors import DataError, RecipeError
from mmkd.recipes.reading import load_recipe, read_raw
from mmkd.recipes.starter import METHODS, Starter, pair_names
from mmkd.towers.assemble import train_tokenizer


def write(folder, rows, name="train.jsonl", pictures="."):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    for number in range(len(rows)):
        tiny_picture(folder / pictures, f"{number}.png", number)


def rows(count=8, **more):
    return [{"image": f"{n}.png", "question": "what is it?", "answer": f"red {n}"} | more for n in range(count)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_lines_with_their_own_names(place):
    write(place / "data", rows())
    assert detect("data") == {"format": "jsonl", "root": "data", "prompt": "short"}


def test_other_columns_another_file_and_another_folder_of_pictures(place):
    table = [{"img": f"{n}.png", "query": "what?", "label": "a long answer of many words"} for n in range(4)]
    write(place / "data", table, "rows.jsonl", "photos/all")
    files = {"field.question": "query", "field.answer": "label", "field.image": "img", "images": "photos/all"}
    assert detect("data") == {"format": "jsonl", "root": "data", "split": "rows", "prompt": "plain", "files": files}
    assert detect("data/rows.jsonl") == detect("data")


def test_conversations_pairs_choices_and_words_alone(place):
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    write(place / "llava", [{"id": n, "image": f"{n}.png", "conversations": talk} for n in range(3)], "train.json", "images")
    assert detect("llava") == {"format": "llava", "root": "llava"}
    write(place / "chosen", [{"image": "0.png", "question": "what?", "chosen": "red", "rejected": "blue"}])
    assert detect("chosen")["format"] == "preference"
    write(place / "letters", rows(choices=["red 0", "blue"]))
    assert detect("letters")["prompt"] == "letter"
    write(place / "words", [{"question": "what?", "answer": "red"}])
    assert detect("words")["text_only"] is True
    assert detect("scienceqa") == {"card": "scienceqa"}


def test_tables(place):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    (place / "table").mkdir()
    write_table(pa.table({"picture": [b"x"], "question": ["what?"], "response": ["red"]}), "table/train-0.parquet")
    assert detect("table") == {"format": "datasets", "root": "table", "files": {"answer": "response", "image": "picture"}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "no folder or file data"),
        (lambda f: f.mkdir(), "holds no .jsonl"),
        (lambda f: write(f, [{"words": "x"}]), "looks like the question and answer; they have words"),
        (lambda f: (write(f, rows(1), "a.jsonl"), write(f, rows(1), "b.jsonl")), "say which"),
        (lambda f: write(f, [], "train.jsonl"), "holds no rows"),
    ],
)
def test_data_that_cannot_be_told(make, message, place):
    make(place / "data")
    with pytest.raises(DataError, match=message):
        detect("data")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    for seed, name in enumerate(("teacher", "student")):
        tiny_tower(seed).save(folder / name)
    return folder


def test_the_recipe_passes_a_dry_run(place, towers, capsys):
    write(place / "data", rows())
    (place / "data" / "test.jsonl").write_text((place / "data" / "train.jsonl").read_text())
    words = ["--data", "data", "--teacher", str(towers / "teacher"), "--student", str(towers / "student")]
    assert main(["init", "mine.yaml", *words, "--gpus", "0"]) == 0
    out = capsys.readouterr().out
    assert "8 samples, no GPUs, method kl" in out
    text = (place / "mine.yaml").read_text()
    assert text.count("#") >= 10 and "mmkd distill mine.yaml" in text
    assert main(["distill", "mine.yaml", "--dry-run", "guards.pixels_matter=false"]) == 0
    assert "stage distil: 8 samples" in capsys.readouterr().out
    recipe = load_recipe("mine.yaml")
    assert recipe.evaluation.benchmarks == ["mine_test.yaml"] and recipe.stages["distil"].epochs == 3
    assert main(["init", "mine.yaml", *words]) == 2 and "--force" in capsys.readouterr().err


def test_another_tokenizer_is_seen(place, towers, capsys):
    write(place / "data", rows())
    tiny_tower(tokenizer=train_tokenizer(["quite other words"] * 9, 300)).save(place / "student")
    words = ["--data", "data", "--teacher", str(towers / "teacher"), "--student", "student"]
    assert main(["init", *words, "--gpus", "0"]) == 0 and "method spans" in capsys.readouterr().out
    assert main(["distill", "recipe.yaml", "--dry-run", "guards.pixels_matter=false"]) == 0
    assert "spans" in capsys.readouterr().out
    assert main(["init", "kl.yaml", *words, "--method", "kl", "--gpus", "0"]) == 0 and "method kl" in capsys.readouterr().out


def test_a_recipe_works_from_any_folder(place, towers, capsys):
    write(place / "data", rows())
    words = ["--data", "data", "--student", str(towers / "student"), "--gpus", "8"]
    assert main(["init", "elsewhere/mine.yaml", *words]) == 0
    (place / "other").mkdir()
    os.chdir(place / "other")
    recipe = load_recipe("../elsewhere/mine.yaml")
    assert os.path.isdir(recipe.stages["distil"].data[0].root)
    assert recipe.stages["distil"].terms.keys() == {"cross_entropy"}  # no teacher was given
    assert recipe.stages["distil"].precision == "bfloat16" and recipe.stages["distil"].optimiser.batch_size == 32
    assert "torchrun --nproc-per-node 8" in (place / "elsewhere" / "mine.yaml").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_valid_recipe(method, place):
    starter = Starter("qwen2.5-vl-7b", "siglip-base-224 + qwen2.5-0.5b", [{"card": "scienceqa"}], method, gpus=1)
    (place / "recipe.yaml").write_text(starter.text("recipe.yaml"))
    assert read_raw("recipe.yaml") == starter.content()
    recipe = load_recipe("recipe.yaml")
    assert recipe.student.assemble.vision.source == "hf-hub:google/siglip-base-patch16-224"
    assert recipe.teacher.model == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_every_pair_is_a_recipe_by_name(place):
    assert len(pair_names()) >= 6
    for name in pair_names():
        recipe = load_recipe(f"pair:{name}", ["data=scienceqa", "stages.distil.optimiser.batch_size=8"])
        assert recipe.stages["distil"].data[0].card == "scienceqa" and recipe.output == f"runs/{name}"
        assert recipe.stages["distil"].optimiser.batch_size == 8
    assert load_recipe("pair:llava-1.5-7b-to-siglip-smollm2-360m", ["data=scienceqa"]).teacher.alignment == "spans"
    with pytest.raises(DataError, match="give data=FOLDER"):
        load_recipe("pair:qwen2.5-vl-7b-to-3b")
    with pytest.raises(DataError, match="did you mean"):
        load_recipe("pair:qwen2.5-vl-7b-to-4b", ["data=scienceqa"])


def test_recipes_that_mmkd_brings_go_by_name(place):
    recipe = load_recipe("quickstart")
    assert os.path.isdir(recipe.teacher.model)  # found up to the project's root
    assert load_recipe("methods/llava_kd").title.startswith("LLaVA-KD")
    with pytest.raises(RecipeError):
        load_recipe("no_such_recipe")


def test_mistakes(place, capsys):
    write(place / "data", rows(2))
    for words, message in (
        (["--data", "data"], "give --student"),
        (["--data", "data", "--student", "a/b", "--pair", "x"], "leave --teacher and --student out"),
        (["--data", "data", "--student", "a/b", "--method", "kll", "--teacher", "c/d"], "did you mean 'kl'"),
        (["--data", "data", "--student", "a/b", "--method", "kl"], "give --teacher"),
    ):
        assert main(["init", "r.yaml", *words]) == 2
        assert message in capsys.readouterr().err and not (place / "r.yaml").exists()


def test_what_is_written_is_yaml_with_a_comment_on_each_part(place):
    text = Starter("a/b", "c/d", [{"card": "scienceqa"}]).text("r.yaml")
    assert yaml.safe_load(text)["student"] == {"model": "c/d"}
    assert "# kl: answers" in text and "0 samples" not in text

"""Samples of a recipe as its towers read them: what is marked is what is learnt, and nothing is written."""

import json
import re

import pytest
import yaml
from html_page import Page
from tiny import VISIONS, tiny_family, tiny_picture, tiny_samples, tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.recipes.reading import load_recipe
from mmkd.runs.show import as_text, pieces_of, show, sizes_of, spread

COUNT = 12
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="alert(2)"> \x1b]0;red\x07'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_tower(0).save(folder / "student")
    tiny_tower(1, 32, vision=VISIONS["vit"] | {"image_size": 32}, image_size=(32, 32)).save(folder / "teacher")
    return folder


def write_recipe(folder, models, changed=(), **stage):
    rows = []
    for number in range(COUNT):
        tiny_picture(folder / "data", f"{number}.png", number)
        row = {"id": f"row{number}", "image": f"{number}.png", "question": "what is it?", "answer": "red round"}
        rows.append(row | dict(changed).get(number, {}))
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"data": [{"format": "jsonl", "root": str(folder / "data")}], "epochs": 1, "optimiser": {"batch_size": 4}}
    recipe = {
        "title": "shown <b>samples</b>", "output": str(folder / "run"), "max_length": 160, "control": False,
        "teacher": {"model": str(models / "teacher")}, "student": {"model": str(models / "student")},
        "guards": {"teacher_is_better": False, "max_skipped": 0.1},
        "stages": {"only": entry | {"terms": {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}}} | stage},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def shown(models, tmp_path_factory):
    """(recipe's folder, what is shown): row 6 is hostile, row 8 too long."""
    folder = tmp_path_factory.mktemp("shown")
    path = write_recipe(folder, models, {6: {"question": HOSTILE}, 8: {"question": "what? " * 60}})
    before = sorted(folder.rglob("*"))
    found = show(load_recipe(path), 4)
    assert sorted(folder.rglob("*")) == before
    return folder, found


def entry_of(shown):
    (stage,) = shown.stages
    (entry,) = stage.entries
    return entry


def test_marked_tokens_are_the_answer_and_its_end_in_both_towers(shown):
    usable = [sample for sample in entry_of(shown[1]).samples if not sample.left_out]
    assert len(usable) == 4
    tower = tiny_tower(0)
    for sample in usable:
        assert [view.role for view in sample.views] == ["student", "teacher"]
        for view in sample.views:
            (learnt,) = [piece for piece in view.pieces if piece.kind == "learnt"]
            end = tower.tokenizer.eos_token_id  # the tokenizer puts a space before an answer
            assert tower.tokenizer.decode(learnt.ids[:-1]).strip() == "red round" and learnt.ids[-1] == end
            assert tower.tokenizer.decode(learnt.ids) == learnt.text and view.learnt == len(learnt.ids)
            assert sum(len(piece.ids) for piece in view.pieces) == view.tokens


def test_each_tower_sees_its_own_size_and_count_of_tokens(shown):
    student, teacher = entry_of(shown[1]).samples[0].views
    assert (student.sizes, student.visual) == (((16, 16),), 4)
    assert (teacher.sizes, teacher.visual) == (((32, 32),), 16)
    assert [frame.size for frame in teacher.frames] == [(32, 32)]
    assert teacher.tokens == student.tokens + 12
    assert "sees 32x32 pixels" in as_text(shown[1]) and "(16 visual) of max_length 160" in as_text(shown[1])


def test_a_frame_has_the_colours_of_the_picture(tmp_path, models):
    from PIL import Image

    path = write_recipe(tmp_path, models)
    Image.new("RGB", (20, 16), (200, 30, 90)).save(tmp_path / "data" / "6.png")
    (sample,) = entry_of(show(load_recipe(path), 1)).samples
    for view in sample.views:
        assert all(abs(a - b) <= 2 for a, b in zip(view.frames[0].getpixel((8, 8)), (200, 30, 90), strict=True))


def test_samples_are_spread_and_what_is_left_out_comes_with_its_reason(shown):
    assert spread(12, 4) == [1, 4, 7, 10] and spread(3, 9) == [0, 1, 2] and spread(0, 3) == []
    *usual, long = entry_of(shown[1]).samples
    assert [sample.place for sample in usual] == spread(COUNT, 4)
    assert long.id == "row8" and "more than max_length 160" in long.left_out
    assert all(view.tokens > 160 and "too many" in view.facts for view in long.views)
    assert "left out: " in as_text(shown[1]) and "1 of 12 samples cannot be used" in as_text(shown[1])


def test_the_text_marks_what_is_learnt_and_is_coloured_only_if_asked(shown):
    plain, coloured = as_text(shown[1]), as_text(shown[1], colour=True)
    assert "⟦ red round<|end|>⟧" in plain and "\x1b" not in plain
    assert "\x1b[1;32m⟦ red round" in coloured and re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_the_page_escapes_what_data_say_and_needs_nothing_else(models, tmp_path, capsys):
    path = write_recipe(tmp_path, models, {6: {"question": HOSTILE, "id": "<i>row</i>"}})
    page = tmp_path / "page.html"
    before = sorted(tmp_path.rglob("*"))
    assert main(["show", str(path), "--samples", "1", "--html", str(page)]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, page]) and str(page) in capsys.readouterr().out
    text = page.read_text()
    assert HOSTILE.partition(" \x1b")[0] in Page(text).words()
    assert "<script" not in text and "<img src=x" not in text and "<b>samples" not in text and "<i>row" not in text
    assert "\x1b" not in text and "&lt;script&gt;alert(1)" in text
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert re.search(r"<mark> red round&lt;.end.&gt;</mark>", text)


def test_what_stops_a_run_stops_show_before_anything_is_written(models, tmp_path, capsys):
    path = write_recipe(tmp_path, models, {n: {"question": "what? " * 60} for n in (1, 5, 8)})
    assert main(["show", str(path), "--html", str(tmp_path / "page.html")]) == 2
    assert "guards.max_skipped" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    assert main(["show", str(path), "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "its folder is not there" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"guards\.max_skipped"):
        show(load_recipe(path))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_sizes_are_those_that_a_family_s_processor_makes(name, tmp_path):
    tower = tiny_family(name)
    (sample,) = tiny_samples(tmp_path, 1)
    encoded = tower.encode(sample)
    made = tower.processor.image_processor([[ref.load() for ref in sample.images]], return_tensors="pt")
    sizes = sizes_of(tower, encoded)
    if name == "idefics3":
        assert sizes == [tuple(made["pixel_values"].shape[:-3:-1])] * made["pixel_values"].shape[1]
    else:  # a token is a square of merged patches
        side = tower.processor.image_processor.patch_size * tower.processor.image_processor.merge_size
        assert sum(w * h for w, h in sizes) == tower.visual_count(encoded) * side**2
    assert "".join(piece.text for piece in pieces_of(tower, encoded) if piece.kind == "learnt").startswith(sample.answer)


def test_a_pair_of_preferences_shows_both_answers(models, tmp_path):
    tiny_picture(tmp_path / "data", "0.png", 0)
    rows = [{"image": "0.png", "prompt": "what is it?", "chosen": "red round", "rejected": "blue square"}] * 4
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"format": "preference", "root": str(tmp_path / "data"), "files": {"annotations": "pairs.jsonl"}}
    path = write_recipe(tmp_path, models, data=[entry], terms={"dpo": {"beta": 0.1, "weight": 1.0}})
    (sample,) = entry_of(show(load_recipe(path, ["max_length=64"]), 1)).samples
    texts = {view.role: "".join(p.text for p in view.pieces if p.kind == "learnt").strip() for view in sample.views}
    assert texts["student"].startswith("red round") and texts["student, rejected answer"].startswith("blue square")


def test_each_answer_of_a_conversation_is_marked(models, tmp_path):
    said = [("human", "<image>\nwhat is it?"), ("gpt", "red"), ("human", "and its shape?"), ("gpt", "round")]
    tiny_picture(tmp_path / "data", "0.png", 0)
    row = {"id": "talk", "image": "0.png", "conversations": [{"from": who, "value": text} for who, text in said]}
    (tmp_path / "data" / "talk.json").write_text(json.dumps([row] * 4))
    entry = {"format": "llava", "root": str(tmp_path / "data"), "files": {"annotations": "talk.json"}}
    path = write_recipe(tmp_path, models, data=[entry])
    (sample,) = entry_of(show(load_recipe(path), 1)).samples
    for view in sample.views:
        learnt = [piece.text.replace("<|end|>", "").strip() for piece in view.pieces if piece.kind == "learnt"]
        assert learnt == ["red", "round"]

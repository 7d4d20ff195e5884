"""Preference pairs: the layouts that preference trainers write, and a clear message for whatever is wrong."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_picture

from mmkd.data.entries import read_samples
from mmkd.data.formats import read_split
from mmkd.data.preference import rejected_of
from mmkd.data.samples import Sample, Turn
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError

ROW = {"prompt": "What is it?", "images": ["a.png"], "chosen": "a valve", "rejected": "a pump"}


def write(folder, *rows, name="train.jsonl"):
    tiny_picture(folder, "a.png", 0)
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(folder, *rows, **options):
    return read_split("preference", write(folder, *rows), "train", **options)


def one(folder, **changes):
    row = {key: value for key, value in (ROW | changes).items() if value is not None}
    (sample,) = read(folder, row)
    return sample


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_pair_is_a_sample_with_the_chosen_answer(tmp_path, name):
    write(tmp_path, ROW, ROW | {"id": 7, "images": []}, name=name)
    first, second = read_split("preference", tmp_path, "train")
    assert first.turns == (Turn("user", "What is it?", 1), Turn("assistant", "a valve"))
    assert [ref.name for ref in first.images] == ["a.png"] and first.images[0].load().size == (20, 16)
    assert rejected_of(first).turns == (Turn("user", "What is it?", 1), Turn("assistant", "a pump"))
    assert rejected_of(first).images == first.images and rejected_of(first).id == first.id == "train-0"
    assert (second.id, second.images, second.turns[0].images) == ("7", (), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "<image>\nWhat is it?"},
        {"prompt": [message("user", "What is it?")]},
        {"prompt": [message("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])]},
        {"image": "a.png", "images": None},
        {"chosen": [message("assistant", "a valve")], "rejected": [message("assistant", [{"type": "text", "text": "a pump"}])]},
    ],
)
def test_all_layouts_give_the_same_pair(tmp_path, changes):
    assert one(tmp_path, **changes) == one(tmp_path)


def test_conversations_keep_their_turns_and_the_first_question_shows_the_picture(tmp_path):
    spoken = [("system", "Be brief."), ("user", "Hello."), ("assistant", "Yes?"), ("user", "What is it?")]
    prompt = [message(*turn) for turn in spoken]
    turns = one(tmp_path, prompt=prompt).turns
    assert [(t.role, t.images) for t in turns] == [("system", 0), ("user", 1), ("assistant", 0), ("user", 0), ("assistant", 0)]
    prompt[-1] = message("user", "What is it?<image>")
    assert [t.images for t in one(tmp_path, prompt=prompt).turns] == [0, 0, 0, 1, 0]


def test_other_field_names_and_repeated_ids(tmp_path):
    row = {"question": "What is it?", "image_path": "a.png", "chosen": "a valve", "rejected": "a pump", "idx": 3}
    files = {"field.prompt": "question", "field.image": "image_path", "field.id": "idx"}
    samples = read(tmp_path, row, row, files=files)
    assert [s.id for s in samples] == ["3", "3#2"] and all(len(s.images) == 1 for s in samples)


def test_a_recipe_reads_pairs_and_limits_them(tmp_path):
    write(tmp_path, *(ROW | {"chosen": f"answer {i}"} for i in range(5)))
    spec = DataSpec(format="preference", root=str(tmp_path), limit=3)
    samples = read_samples(spec, seed=0)
    assert len(samples) == 3 and all(rejected_of(s).answer == "a pump" for s in samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": None}, "line 1: key 'rejected' is missing; keys there: 'prompt', 'images', 'chosen'"),
        ({"prompt": None}, "key 'prompt' is missing"),
        ({"chosen": "  "}, "'chosen' is empty; a pair needs two answers"),
        ({"rejected": " a valve\n"}, "'chosen' and 'rejected' are the same answer"),
        ({"rejected": 3}, "key 'rejected' is a number"),
        ({"prompt": 3}, "key 'prompt' is a number"),
        ({"images": ["../a.png"]}, "leaves its root"),
        ({"images": ["/etc/passwd"]}, "leaves its root"),
        ({"prompt": "<image><image> What?"}, "the prompt shows 2 pictures and 'images' names 1"),
        ({"chosen": "it is <image>"}, "'chosen' holds the marker <image>"),
        ({"chosen": [message("user", "a valve")]}, "'chosen' is a message of 'user'"),
        ({"chosen": [message("user", "What?"), message("assistant", "a valve")]}, "a conversation of 2 messages"),
        ({"prompt": [message("user", "What?"), message("assistant", "a valve")]}, "must alternate, from user to user"),
        ({"prompt": []}, "must alternate, from user to user"),
        ({"prompt": [message("bot", "What?")]}, "role 'bot'; there are system, user, assistant"),
        ({"prompt": [message("user", [{"type": "video"}])]}, "a part of type 'video'"),
        ({"prompt": [message("user", [{"type": "image"}])]}, "the message of 'user' has no words"),
    ],
)
def test_wrong_rows_are_named(tmp_path, changes, message):
    with pytest.raises(DataError) as error:
        one(tmp_path, **changes)
    assert message in str(error.value) and "train.jsonl line 1" in str(error.value)


def test_a_sample_without_a_second_answer_is_no_pair():
    with pytest.raises(DataError, match="need data of `format: preference`"):
        rejected_of(Sample("x", (), (Turn("user", "What?"), Turn("assistant", "a valve"))))


def test_empty_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no pairs"):
        read_split("preference", write(tmp_path, name="train.json"), "train")

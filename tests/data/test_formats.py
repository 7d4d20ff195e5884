"""Readers: official layouts, subsets, targets; whatever is wrong is an error with the file and the row."""

import json
import zipfile
from pathlib import Path

import pytest

from mmkd.data.formats import read_questions, read_split
from mmkd.data.prompts import render
from mmkd.data.samples import Turn, check_images
from mmkd.data.tally import Tally
from mmkd.errors import DataError

PROBLEM = {
    "question": "Which is it?",
    "choices": ["bird", "fish"],
    "answer": 1,
    "hint": "",
    "image": "image.png",
    "grade": "grade7",
    "subject": "natural science",
    "topic": "biology",
    "split": "val",
}


def write(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def write_lines(folder: Path, rows: list[dict]) -> Path:
    return write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def science(root, problems=None, splits=None):
    problems = {"1": PROBLEM, "2": PROBLEM | {"image": None, "hint": "H"}} if problems is None else problems
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", splits or {"val": list(problems), "minival": list(problems)[:1]})
    return root


def textvqa(root, rows, split="train", **top):
    write(root / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "data": rows} | top)
    return root


def entry(number, image="a", **more):
    answers = ["stop", "go", "go", "stop", "go"]
    return {"question": "What?", "image_id": image, "answers": answers, "question_id": number} | more


def jsonl(root, *rows, split="train"):
    write(
        root / f"{split}.jsonl", "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    )
    return root


# ---- ScienceQA


@pytest.mark.parametrize("folder", ["images/val/1", "val/1"])
def test_scienceqa_in_both_official_layouts(tmp_path, folder):
    write(science(tmp_path) / folder / "image.png", b"")
    first, second = read_questions("scienceqa", tmp_path, "val")
    assert check_images([first, second]) == 0
    assert (first.id, first.question, first.choices, first.answer_index) == (
        "1",
        "Which is it?",
        ("bird", "fish"),
        1,
    )
    assert (first.answer, first.references, first.hint) == ("fish", ("fish",), "")
    assert first.categories == {
        "subject": "natural science", "grade": "grade7", "grades": "7-12", "topic": "biology",
        "text_context": "no", "image_context": "yes", "no_context": "no",
    }  # fmt: skip
    assert (second.images, second.hint, second.categories["text_context"]) == ((), "H", "yes")


def test_scienceqa_part_of_a_split_has_its_pictures_under_the_split(tmp_path):
    write(science(tmp_path) / "images/val/1/image.png", b"")
    assert check_images(read_questions("scienceqa", tmp_path, "minival")) == 0


def test_scienceqa_with_annotators(tmp_path):
    science(tmp_path, {"1": PROBLEM | {"answers": [0, 1, 0]}})
    indices = {
        t: read_questions("scienceqa", tmp_path, "val", target=t)[0].answer_index
        for t in ("first", "majority")
    }
    assert indices == {"first": 1, "majority": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, r"problem '1': key 'answer' is 2, there are 2 choices"),
        ({"answer": "B"}, r"problem '1': key 'answer' is a string \('B'\), a whole number"),
        ({"answer": True}, "true or false"),
        ({"answers": [0, 5]}, "'answers' holds 5"),
        ({"choices": ["bird"]}, "1 choices; 2 to 26"),
        ({"choices": ["bird", 3]}, "entry 1 of 'choices' is a number"),
        ({"question": None}, "key 'question' is null"),
        ({"image": 3}, "key 'image' is a number"),
        ({"image": "../../../../etc/passwd"}, "problem '1'.*leaves its root"),
        ({"split": "../../.."}, "problem '1'.*leaves its root"),
    ],
)
def test_scienceqa_names_the_problem_and_the_key(tmp_path, change, message):
    science(tmp_path, {"1": PROBLEM | change})
    with pytest.raises(DataError, match=message):
        read_questions("scienceqa", tmp_path, "val")


def test_scienceqa_errors_of_the_whole(tmp_path):
    science(tmp_path, splits={"val": ["1", "9"]})
    with pytest.raises(DataError, match="names problem '9'"):
        read_questions("scienceqa", tmp_path, "val")
    with pytest.raises(DataError, match="no split 'test'; there are val"):
        read_questions("scienceqa", tmp_path, "test")
    science(tmp_path, splits={"val": ["1", "1"]})
    with pytest.raises(DataError, match="questions 0 and 1 .* same id '1'"):
        read_questions("scienceqa", tmp_path, "val")
    science(tmp_path, {"1": {k: v for k, v in PROBLEM.items() if k != "choices"}})
    with pytest.raises(DataError, match="key 'choices' is missing; keys there: 'question', 'answer'"):
        read_questions("scienceqa", tmp_path, "val")
    science(tmp_path, {}, {"val": []})
    with pytest.raises(DataError, match="holds no questions"):
        read_questions("scienceqa", tmp_path, "val")
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(DataError, match="has no file pid_splits.json"):
        read_questions("scienceqa", tmp_path, "val")


# ---- TextVQA


@pytest.mark.parametrize(
    "image", ["train_images/a.jpg", "images/val/a.png", "images/val/a.jpg", "val_images/a.jpg"]
)
def test_textvqa_in_several_layouts(tmp_path, image):
    write(textvqa(tmp_path, [entry(5), entry(6)], "val") / image, b"")
    questions = read_questions("textvqa", tmp_path, "val")
    assert check_images(questions) == 0
    assert [q.id for q in questions] == ["5", "6"]
    assert questions[0].references == ("stop", "go", "go", "stop", "go")


def test_textvqa_by_patterns_and_with_ocr_tokens(tmp_path):
    write(tmp_path / "pages/SROIE_TextVQA_format_test.json", {"data": [entry(1, field="date")]})
    write(tmp_path / "pages/images/test/a.jpg", b"")
    write(tmp_path / "ocr_test.json", {"data": [{"image_id": "a", "ocr_tokens": ["STOP", "4"]}]})
    files = {
        "annotations": "pages/SROIE_TextVQA_format_{split}.json",
        "images": "pages/images/{split}/{image_id}.jpg",
        "ocr": "ocr_{split}.json",
    }
    (question,) = read_questions("textvqa", tmp_path, "test", files=files)
    assert check_images([question]) == 0
    assert (question.ocr_tokens, question.categories) == (("STOP", "4"), {"field": "date"})


def test_textvqa_test_split_has_no_answers(tmp_path):
    row = entry(1)
    del row["answers"]
    (question,) = read_questions("textvqa", textvqa(tmp_path, [row], "test"), "test")
    assert (question.answer, question.references) == ("", ())


def test_textvqa_pictures_in_an_archive(tmp_path):
    textvqa(tmp_path, [entry(1), entry(2, image="b")])
    with zipfile.ZipFile(tmp_path / "train_val_images.zip", "w") as opened:
        opened.writestr("train_images/a.jpg", b"")
    questions = read_questions("textvqa", tmp_path, "train")
    assert questions[0].images[0].name == "train_images/a.jpg"
    assert check_images(questions, allowed_missing=1) == 1
    with pytest.raises(DataError, match=r"1 of 2 images are missing \(allowed: 0\): .*train_images/b.jpg"):
        check_images(questions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([entry(1), entry(1)], "questions 0 and 1 .* same id '1'"),
        ([entry(1), entry(2, answers="go")], "train.json entry 1: key 'answers' is a string"),
        ([entry(1), entry(2, answers=["go", 4])], "entry 1: entry 1 of 'answers' is a number"),
        ([entry(1, image="../../../secret")], "entry 0: .*leaves its root"),
        ([entry(1), [2]], "entry 1: a list where an object is expected"),
        ([entry(None)], "key 'question_id' is null"),
        ({}, "holds an object as 'data', a list is expected"),
    ],
)
def test_textvqa_names_the_entry_and_the_key(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_questions("textvqa", textvqa(tmp_path, rows), "train")


def test_an_unknown_split_lists_those_there_are(tmp_path):
    textvqa(tmp_path, [entry(1)], "val")
    textvqa(tmp_path, [entry(1)], "train")
    with pytest.raises(DataError, match=r"no split 'dev' \(TextVQA_0.5.1_dev.json\); there are train, val"):
        read_questions("textvqa", tmp_path, "dev")


# ---- broken files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"data": [{"question": "Wh', "no valid JSON: Unterminated string"),
        (b'{"data": [', r"no valid JSON: .*the end: is the file complete\?"),
        (b'{"data": [NaN]}', "NaN is no JSON value"),
        (b'{"data": [], "data": []}', "key 'data' is there twice"),
        (b'["data"]', "a list where an object is expected"),
        (b'{"rows": []}', "key 'data' is missing; keys there: 'rows'"),
        (b'{"data": ["\xff"]}', "not in UTF-8"),
        (b"[" * 200_000, "no valid JSON"),
    ],
)
def test_broken_json_is_an_error_that_names_the_file(tmp_path, content, message):
    write(tmp_path / "TextVQA_0.5.1_train.json", content)
    with pytest.raises(DataError, match=message) as error:
        read_questions("textvqa", tmp_path, "train")
    assert "TextVQA_0.5.1_train.json" in str(error.value)


def test_a_byte_order_mark_is_no_matter(tmp_path):
    write(tmp_path / "TextVQA_0.5.1_train.json", b"\xef\xbb\xbf" + json.dumps({"data": [entry(1)]}).encode())
    assert len(read_questions("textvqa", tmp_path, "train")) == 1
    write(tmp_path / "train.jsonl", b"\xef\xbb\xbf" + b'{"question": "Why?"}\r\n')
    assert len(read_questions("jsonl", tmp_path, "train")) == 1


# ---- easy-VQA


@pytest.mark.parametrize("zipped", [False, True])
def test_easy_vqa_official_and_zipped(tmp_path, zipped):
    rows = [
        ["what color is the shape?", "teal", 0],
        ["is there a circle?", "no", 0],
        ["what shape is it?", "circle", 1],
    ]
    write(tmp_path / ("test_questions.json" if zipped else "test/questions.json"), rows)
    if zipped:
        with zipfile.ZipFile(tmp_path / "test_images.zip", "w") as opened:
            opened.writestr("0.png", b"")
            opened.writestr("1.png", b"")
    else:
        write(tmp_path / "test/images/0.png", b"")
        write(tmp_path / "test/images/1.png", b"")
    questions = read_questions("easy_vqa", tmp_path, "test")
    assert check_images(questions) == 0
    assert [(q.id, q.answer, q.categories["kind"]) for q in questions] == [
        ("test-0", "teal", "color"),
        ("test-1", "no", "yes/no"),
        ("test-2", "circle", "shape"),
    ]


def test_easy_vqa_knows_what_a_picture_shows_and_an_answer_claims(tmp_path):
    rows = [
        ["what color is the shape?", "teal", 0],
        ["is no circle present?", "no", 0],
        ["does the image contain a red shape?", "no", 0],
        ["is there a star?", "no", 0],
        ["what is the red shape?", "triangle", 1],
        ["is a red shape present?", "yes", 1],
    ]
    write(tmp_path / "test/questions.json", rows)
    questions = read_questions("easy_vqa", tmp_path, "test")
    assert [q.shown for q in questions] == [("teal", "circle")] * 4 + [("triangle", "red")] * 2
    assert [q.claims for q in questions] == [{}, {"no": "circle"}, {"yes": "red"}, {}, {}, {"yes": "red"}]


@pytest.mark.parametrize("row", [["is it?", "no"], {"question": "is it?"}, ["is it?", 3, 0], [None, "no", 0]])
def test_easy_vqa_names_the_entry(tmp_path, row):
    write(tmp_path / "train_questions.json", [["is it?", "no", 0], row])
    with pytest.raises(DataError, match="train_questions.json entry 1"):
        read_questions("easy_vqa", tmp_path, "train")


# ---- JSON lines


def test_jsonl_with_everything(tmp_path):
    row = {
        "id": 9, "images": ["x.png", "y.png"], "question": "Which?", "choices": ["a", "b", "b"], "answer": 2,
        "hint": "H", "ocr_tokens": ["T"], "categories": {"level": "easy"},
    }  # fmt: skip
    jsonl(
        tmp_path,
        row,
        "",
        {"question": "Why?", "answers": ["so", "thus"]},
        {"question": "Who?", "image": None},
    )
    write(tmp_path / "images/train/x.png", b"")
    first, second, third = read_questions("jsonl", tmp_path, "train")
    assert (first.id, first.answer, first.answer_index, first.references) == ("9", "b", 2, ("b",))
    assert first.images[0].root == tmp_path / "images/train"
    assert (first.hint, first.ocr_tokens, first.categories) == ("H", ("T",), {"level": "easy"})
    assert (second.id, second.answer, second.references) == ("train-1", "so", ("so", "thus"))
    assert (third.answer, third.references, third.images) == ("", (), ())


def test_jsonl_choice_by_its_text(tmp_path):
    (question,) = read_questions(
        "jsonl", jsonl(tmp_path, {"question": "Which?", "choices": ["a", "b"], "answer": "b"}), "train"
    )
    assert question.answer_index == 1


@pytest.mark.parametrize("folder", ["pictures", "pictures.zip", "."])
def test_jsonl_pictures_in_a_folder_or_archive(tmp_path, folder):
    jsonl(tmp_path, {"question": "What?", "image": "sub/x.png"})
    if folder.endswith("zip"):
        with zipfile.ZipFile(tmp_path / folder, "w") as opened:
            opened.writestr("sub/x.png", b"")
    else:
        write(tmp_path / folder / "sub/x.png", b"")
    questions = read_questions("jsonl", tmp_path, "train", files={"images": folder})
    assert check_images(questions) == 0


def test_jsonl_with_other_names_of_fields_and_as_a_list(tmp_path):
    """POPE's files are JSON lines that are called .json."""
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes", "kind": "popular"}
    ]
    write(tmp_path / "coco_pope.json", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "list.json", rows)
    names = {
        "field.id": "question_id",
        "field.question": "text",
        "field.answer": "label",
        "field.categories": "kind",
    }
    for name in ("coco_pope.json", "list.json"):
        (question,) = read_questions("jsonl", tmp_path, "test", files=names | {"annotations": name})
        assert (question.id, question.question, question.answer) == ("1", "Is there a dog?", "yes")
        assert question.categories == {"kind": "popular"}
    with pytest.raises(DataError, match="key 'asked' is missing"):
        files = {"annotations": "list.json", "field.question": "asked"}
        read_questions("jsonl", tmp_path, "test", files=files)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "Wh', "train.jsonl line 2 is no valid JSON"),
        ("[1]", "line 2: a list where an object is expected"),
        ({"answer": "x"}, "line 2: key 'question' is missing; keys there: 'answer'"),
        ({"question": "Q", "answer": 3}, r"line 2: key 'answer' is a number \(3\), a string"),
        ({"question": "Q", "answer": "c", "choices": ["a", "b"]}, "answer 'c' is none of the choices"),
        ({"question": "Q", "answer": 2, "choices": ["a", "b"]}, "key 'answer' is 2, there are 2 choices"),
        ({"question": "Q", "answer": "a", "answers": ["a"]}, "both 'answer' and 'answers'"),
        ({"question": "Q", "answers": []}, "'answers' is empty"),
        ({"question": "Q", "image": "a", "images": ["a"]}, "both 'image' and 'images'"),
        ({"question": "Q", "images": ["a", ""]}, "empty name"),
        ({"question": "Q", "video": "a.mp4"}, "line 2: key 'video' names a video"),
        ({"question": "Q", "audio": "a.wav"}, "line 2: key 'audio' names a sound"),
        ({"question": "Q", "video_path": "a.mp4"}, "line 2: key 'video_path' names a video"),
        ({"question": "Q", "image": "HTTPS://a.b/c.png"}, "line 2: key 'image' is 'HTTPS://a.b/c.png', no file; save"),
        ({"question": "Q", "images": ["a.png", "data:image/png;base64,iV"]}, "is 'data:image/png;base64,iV', no file"),
        ({"question": "Q <image> and <image>?", "image": "a"}, "line 2 holds the marker <image> in its text, 2 times"),
        ({"question": "Q", "image": "a", "answer": "an <image>"}, "line 2: an answer holds the marker <image>"),
        ({"question": "Q", "image": "/etc/passwd"}, "line 2: .*leaves its root"),
        ({"question": "Q", "categories": {"level": 3}}, "line 2 categories: key 'level' is a number"),
        ({"id": "train-0", "question": "Q"}, "same id 'train-0'"),
    ],
)
def test_jsonl_names_the_line_and_the_key(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_questions("jsonl", jsonl(tmp_path, {"question": "Q"}, row), "train")


# ---- targets and subsets


def test_targets(tmp_path):
    textvqa(tmp_path, [entry(number) for number in range(40)])

    def answers(target, seed=0):
        return [q.answer for q in read_questions("textvqa", tmp_path, "train", target=target, seed=seed)]

    assert set(answers("first")) == {"stop"}
    assert set(answers("majority")) == {"go"}
    assert answers("sampled") == answers("sampled") != answers("sampled", seed=1)
    assert 0.4 < answers("sampled").count("go") / 40 < 0.8
    with pytest.raises(DataError, match="'best'; there are first, majority, sampled"):
        answers("best")


def test_a_sampled_target_does_not_depend_on_the_other_questions(tmp_path):
    rows = [entry(number) for number in range(10)]
    whole = read_questions("textvqa", textvqa(tmp_path, rows), "train", target="sampled")
    part = read_questions("textvqa", textvqa(tmp_path, rows[5:]), "train", target="sampled")
    assert whole[5:] == part


def test_limits_are_seeded_nested_and_in_order(tmp_path):
    textvqa(tmp_path, [entry(number, image=f"i{number // 4}") for number in range(80)])

    def ids(**options):
        return [int(q.id) for q in read_questions("textvqa", tmp_path, "train", **options)]

    assert ids(limit=10) == sorted(ids(limit=10)) == ids(limit=10)
    assert set(ids(limit=10)) < set(ids(limit=30)) < set(ids(limit=99)) == set(range(80))
    assert ids(limit=10) != ids(limit=10, seed=1)
    three = ids(image_limit=3)
    assert len(three) == 12 and len({number // 4 for number in three}) == 3
    assert set(three) < set(ids(image_limit=5)) and three != ids(image_limit=3, seed=1)
    assert set(ids(image_limit=3, limit=5)) < set(three)
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(DataError, match="limit is"):
            ids(limit=wrong)


# ---- settings


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (
            ("parquet", "train"),
            None,
            "there is no format 'parquet'; known: .*easy_vqa, .*jsonl, .*scienceqa, .*textvqa",
        ),
        (("llava", "train"), None, "format 'llava' holds samples, not questions"),
        (("jsonl", "../train"), None, "no name of a split"),
        (
            ("textvqa", "train"),
            {"image": "x"},
            "unknown key 'image'; did you mean 'images'",
        ),
        (("textvqa", "train"), {"images": ""}, r"files\['images'\] is ''"),
        (
            ("textvqa", "train"),
            {"images": "a/{pid}.jpg"},
            r"unknown placeholder \{pid\}; there are \{image_id\}, \{split\}",
        ),
        (("textvqa", "train"), {"images": "a"}, r"the same for all rows; it needs \{image_id\}"),
        (("textvqa", "train"), {"annotations": "a_{part}.json"}, r"unknown placeholder \{part\}"),
        (("textvqa", "train"), {"annotations": "none.json"}, "has no file none.json"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, arguments, files, message):
    textvqa(tmp_path, [entry(1)])
    with pytest.raises(DataError, match=message):
        read_questions(arguments[0], tmp_path, arguments[1], files=files)


def test_a_missing_root_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_questions("jsonl", tmp_path / "nowhere", "train")


def test_pictures_outside_the_root_by_setting_but_not_by_row(tmp_path):
    """Who writes the recipe may point anywhere; who writes the rows may not."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "elsewhere/a.jpg", b"")
    textvqa(tmp_path / "set", [entry(1)])
    files = {"images": str(tmp_path / "elsewhere/{image_id}.jpg")}
    assert check_images(read_questions("textvqa", tmp_path / "set", "train", files=files)) == 0
    textvqa(tmp_path / "set", [entry(1), entry(2, image="../secret")])
    with pytest.raises(DataError, match="leaves its root"):
        read_questions("textvqa", tmp_path / "set", "train", files=files)


# ---- conversations


def talk(*turns, **row):
    speakers = ("human", "gpt")
    return {
        "id": "x",
        "conversations": [{"from": speakers[i % 2], "value": t} for i, t in enumerate(turns)],
    } | row


def test_conversations(tmp_path):
    rows = [
        talk("<image>\nWhat?", "A star.", "Why?", "Because.", image="a/b.jpg"),
        talk("And this?\n<image>", "A cross.", image=["c.jpg"]),
        talk("Hello.", "Hello!"),
        talk("<image><image>\nWhich?", "The first.", image=["a.jpg", "b.jpg"], id="y"),
    ]
    rows[2]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    write(tmp_path / "train.json", rows)
    first, second, third, fourth = read_split("llava", tmp_path, "train")
    assert first.turns == (
        Turn("user", "What?", 1),
        Turn("assistant", "A star."),
        Turn("user", "Why?"),
        Turn("assistant", "Because."),
    )
    assert second.turns[0] == Turn("user", "And this?", 1)
    assert [turn.role for turn in third.turns] == ["system", "user", "assistant"]
    assert (fourth.turns[0], len(fourth.images)) == (Turn("user", "Which?", 2), 2)
    assert [sample.id for sample in (first, second, third, fourth)] == ["x", "x#2", "x#3", "y"]
    assert len(read_split("llava", tmp_path, "train", limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("<image>\nWhat?", "A star."), "1 markers <image> and 0 images"),
        (talk("What?", "A star.", image="a.jpg"), "0 markers <image> and 1 images"),
        (talk("See <image> here and <image>", "Yes.", image="a.jpg"), "2 markers <image> and 1 images"),
        (talk("What?", "A star.", video="a.mp4"), "entry 0: key 'video' names a video"),
        (talk("<video>\nWhat?", "A star."), "entry 0 turn 0: a marker <video>"),
        (talk("What?", "A star.", "Why?"), "the last turn is the human's"),
        (talk("What?", "<image>", image="a.jpg"), "only the human shows pictures"),
        (talk("What?"), "must alternate"),
        (talk(), "must alternate"),
        (talk("What?", " "), "turn 1: the turn of 'gpt' is empty"),
        ({"id": "x", "conversations": [{"from": "bot", "value": "x"}]}, "speaker 'bot'"),
        ({"id": "x", "conversations": [{"value": "x"}]}, "entry 0 turn 0: key 'from' is missing"),
        ({"id": "x"}, "entry 0: key 'conversations' is missing"),
        (talk("<image>\nWhat?", "A star.", image="../a.jpg"), "entry 0: .*leaves its root"),
    ],
)
def test_conversations_name_the_entry(tmp_path, row, message):
    write(tmp_path / "train.json", [row])
    with pytest.raises(DataError, match=message):
        read_split("llava", tmp_path, "train", files={"images": "."})


def test_pictures_keep_their_place_in_the_text(tmp_path):
    rows = [
        talk("Is <image> left of <image>?", "No.", image=["a.jpg", "b.jpg"]),
        talk("<image>\nIt, <image>, or\n<image>", "It.", image=["a.jpg", "b.jpg", "c.jpg"]),
        talk("How do I use the <image> tag here?", "Write <image> in HTML.", image=""),
    ]
    write(tmp_path / "train.json", rows)
    write_lines(tmp_path, [{"question": "Is <image> left of <image>?", "images": ["a.jpg", "b.jpg"], "answer": "No."}])
    first, second, third = read_split("llava", tmp_path, "train")
    assert first.turns[0] == Turn("user", "Is  left of ?", 2, (3, 12))
    assert second.turns[0] == Turn("user", "It, , or", 3, (0, 4, 8))
    assert second.turns[0].parts == [None, "It, ", None, ", or", None]
    assert third.images == () and [turn.text for turn in third.turns] == [
        "How do I use the <image> tag here?", "Write <image> in HTML.",
    ]  # fmt: skip
    (question,) = read_questions("jsonl", tmp_path, "train")
    short = render(question, "short", with_answer=True).turns[0]
    assert short.text.startswith("Is  left of ?\n") and (short.images, short.places) == (2, (3, 12))


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path):
    good = [talk(f"<image>\nQ{n}?", "A.", image=f"{n}.jpg", id=str(n)) for n in range(94)]
    first_gpt = {"conversations": [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "Hi."}]}
    bad = [
        talk("Q?", "A.", video="a.mp4"), talk("Q?", "A.", video="b.mp4"), first_gpt, talk("Q?"), talk("Q?", " "),
        talk("<image>\nQ?", "A.", image=""),
    ]  # fmt: skip
    write(tmp_path / "train.json", [*good[:50], *bad, *good[50:]])
    tally = Tally()
    with pytest.raises(DataError) as strict:
        read_split("llava", tmp_path, "train")
    kept = read_split("llava", tmp_path, "train", allowed=0.06, tally=tally)
    assert [sample.turns[0].text for sample in kept] == [f"Q{n}?" for n in range(94)]
    assert (tally.rows, tally.count) == (100, 6) and sorted(map(len, tally.dropped.values())) == [1, 1, 1, 1, 2]
    assert "In all 6 of 100 rows cannot be used" in str(strict.value)
    for reason in ("video is not supported (train.json entry 50, train.json entry 51)", "the first turn is gpt's",
                   "the last turn is the human's", "the turn of 'gpt' is empty", "markers <image> and"):  # fmt: skip
        assert reason in str(strict.value) and reason in tally.reasons()
    with pytest.raises(DataError, match="more than the share 0.05 that may be left out"):
        read_split("llava", tmp_path, "train", allowed=0.05)


def test_lines_that_are_no_json_are_rows_that_cannot_be_used(tmp_path):
    write_lines(tmp_path, [{"question": f"Q{n}", "image": "a.png", "answer": "a"} for n in range(30)])
    with (tmp_path / "train.jsonl").open("a") as stream:
        stream.write('[1, 2]\n{"question": "cut of')
    tally = Tally()
    assert len(read_split("jsonl", tmp_path, "train", allowed=0.05, tally=tally)) == 30
    assert tally.count == 2 and "line 32" in tally.reasons()


def test_keys_that_nobody_reads_are_named_and_missing_pictures_refused(tmp_path):
    half = [{"question": f"Q{n}", "answer": "a", "image" if n % 2 else "image_path": "a.png", "answers ": 1} for n in range(8)]
    write_lines(tmp_path, half)
    tally = Tally()
    read_split("jsonl", tmp_path, "train", needs_pictures=True, tally=tally)
    assert tally.lines() == ["pictures in 4 of 8 samples", "keys or columns not used: answers , image_path"]
    write_lines(tmp_path, [{"question": f"Q{n}", "answer": "a", "image_path": "a.png"} for n in range(8)])
    with pytest.raises(DataError, match="pictures in 0 of 8 samples; keys or columns not used: image_path. .*`text_only: true`"):
        read_split("jsonl", tmp_path, "train", needs_pictures=True)
    named = {"field.image": "image_path"}
    assert all(q.images for q in read_split("jsonl", tmp_path, "train", files=named, needs_pictures=True))


# ---- MMBench


def mmbench(root, *rows):
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"
    image = "aGVsbG8gd29ybGQh" * 8
    lines = [head, *("\t".join([str(n), "Which?", *row, "kind", image]) for n, row in enumerate(rows))]
    write(root / "mmbench_dev.tsv", "\n".join(lines) + "\n")
    return read_questions("mmbench", root, "dev")


def test_mmbench_takes_words_for_nothing_as_choices(tmp_path):
    rows = ["", "None", "nan", "NA", "n/a", "D"], ["", "one", "null", "", " ", "B"], ["nan", "none", "NaN", "None", "", "C"]
    first, second, third = mmbench(tmp_path, *rows)
    assert (first.choices, first.answer, first.answer_index) == (("None", "nan", "NA", "n/a"), "n/a", 3)
    assert second.choices == ("one", "null")
    assert (third.choices, third.answer, third.question) == (("none", "NaN", "None"), "None", "Which?")


def test_mmbench_with_a_gap_between_choices_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"row 0: choice B is empty, choice C is not; .*None or NA"):
        mmbench(tmp_path, ["", "one", "", "two", "", "A"])

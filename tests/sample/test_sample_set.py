"""The embedded sample: same bytes, disjoint splits, fair answers, annotators as documented."""

import hashlib
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmkd.data import scenes
from mmkd.data.formats import read_questions
from mmkd.data.samples import check_images
from mmkd.errors import DataError
from mmkd.sample import annotators, sample_set
from mmkd.sample.sample_set import write_sample_set

SIZES = {"train": 700, "val": 20, "test": 300}
TINY = {"train": 4, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "set"
    write_sample_set(folder, seed=3, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def problems(root):
    return json.loads((root / "scienceqa/problems.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def entries(root):
    return {
        split: json.loads((root / f"textvqa/TextVQA_0.5.1_{split}.json").read_text(encoding="utf-8"))["data"]
        for split in SIZES
    }


def of_split(problems, split):
    return [p for p in problems.values() if p["split"] == split]


def captions_of(root, split):
    rows = [json.loads(line) for line in (root / f"captions/{split}.jsonl").open(encoding="utf-8")]
    return {(root / row["image"]).read_bytes(): row["answer"] for row in rows}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---- writing


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sample_set(tmp_path / name, seed=seed, sizes=TINY)
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b
    assert a["scienceqa/problems.json"] != c["scienceqa/problems.json"]


def test_the_sample_of_this_generator_version_stays_what_it_is(tmp_path):
    """A change of these needs a new GENERATOR_VERSION: reports compare runs on the same sample."""
    write_sample_set(tmp_path / "set", seed=0, sizes=TINY)
    files = hashes(tmp_path / "set")
    texts = {name: files[name][:16] for name in sorted(files) if name.endswith(("json", "jsonl"))}
    pixels = hashlib.sha256()
    for name in sorted(files):
        if name.endswith("png"):
            pixels.update(Image.open(tmp_path / "set" / name).tobytes())
    assert sample_set.GENERATOR_VERSION == 4
    assert hashlib.sha256(repr(texts).encode()).hexdigest()[:16] == "b4b1fb597d43e64c"
    assert pixels.hexdigest()[:16] == "4df766492525a777"


def test_a_smaller_split_is_the_head_of_a_larger_one(tmp_path, problems, entries):
    write_sample_set(tmp_path / "set", seed=3, sizes={"train": 40})
    small = json.loads((tmp_path / "set/scienceqa/problems.json").read_text(encoding="utf-8"))
    assert all(problems[pid] == problem for pid, problem in small.items())
    small = json.loads((tmp_path / "set/textvqa/TextVQA_0.5.1_train.json").read_text(encoding="utf-8"))[
        "data"
    ]
    assert small == entries["train"][: len(small)]


def test_writing_again_keeps_what_is_there_and_refuses_another_sample(tmp_path):
    folder = tmp_path / "set"
    write_sample_set(folder, sizes=TINY)
    before = (folder / "sample.json").stat().st_mtime_ns
    write_sample_set(folder, sizes=dict(reversed(TINY.items())))
    assert (folder / "sample.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"seed: 0 there, 1 wanted"):
        write_sample_set(folder, seed=1, sizes=TINY)
    (folder / "sample.json").unlink()
    with pytest.raises(DataError, match="no sample.json"):
        write_sample_set(folder, sizes=TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_nothing_is_left_of_an_interrupted_write(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_set, "_write_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_sample_set(tmp_path / "set", sizes=TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {"dev": 3}}, "dev"),
        ({"sizes": {}}, "train"),
        ({"sizes": {"train": 0}}, "at least 1"),
        ({"sizes": {"train": 2.5}}, "whole number"),
        ({"seed": "x", "sizes": TINY}, "whole number"),
        ({"annotator_accuracy": 1.5, "sizes": TINY}, "probability"),
    ],
)
def test_wrong_parameters_are_refused(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        write_sample_set(tmp_path / "set", **arguments)


# ---- the official layouts


def test_problems_have_the_official_keys(problems, root):
    official = {
        "question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category",
        "skill", "lecture", "solution", "split",
    }  # fmt: skip
    assert all(set(problem) == official | {"answers"} for problem in problems.values())
    splits = json.loads((root / "scienceqa/pid_splits.json").read_text(encoding="utf-8"))
    assert {pid: p["split"] for pid, p in problems.items()} == {pid: s for s in splits for pid in splits[s]}
    assert {p["subject"] for p in problems.values()} == {
        "natural science",
        "social science",
        "language science",
    }
    assert {int(p["grade"].removeprefix("grade")) for p in problems.values()} <= set(range(1, 13))
    assert all(2 <= len(p["choices"]) == len(set(p["choices"])) <= 4 for p in problems.values())


def test_entries_have_the_official_keys(entries):
    keys = {"question", "image_id", "image_classes", "image_width", "image_height", "answers", "question_id"}
    for split, rows in entries.items():
        assert all(keys | {"question_tokens", "set_name"} <= set(row) for row in rows)
        assert all(len(row["answers"]) == 10 and row["set_name"] == split for row in rows)


@pytest.mark.parametrize("split", SIZES)
def test_the_readers_find_every_picture(root, split):
    science = read_questions("scienceqa", root / "scienceqa", split)
    text = read_questions("textvqa", root / "textvqa", split)
    files = {"annotations": "captions/{split}.jsonl", "images": "."}
    captions = read_questions("jsonl", root, split, files=files)
    assert check_images([*science, *text, *captions]) == 0
    assert len(captions) == 2 * SIZES[split]
    assert all(q.images[0].load().size == (64, 64) for q in text[:5])
    assert 0.15 < sum(not q.images for q in science) / len(science) < 0.25


# ---- disjoint splits


def test_no_picture_scene_or_text_question_is_in_two_splits(root, problems):
    pictures, scenes_of, texts = {}, {}, {}
    for split in SIZES:
        captions = captions_of(root, split)
        pictures[split], scenes_of[split] = set(captions), set(captions.values())
        asked = [p for p in of_split(problems, split) if p["image"] is None]
        texts[split] = {(frozenset(p["hint"].split(". ")), p["question"]) for p in asked}
        assert len({(p["hint"], p["question"]) for p in asked}) == len(asked)
    for found in (pictures, scenes_of, texts):
        assert all(found.values())
        assert sum(len(f) for f in found.values()) == len(set().union(*found.values()))


# ---- answers


def test_letters_and_answers_are_balanced(problems, entries):
    """Within four standard deviations of uniform."""
    asked = [p for p in of_split(problems, "train") if p["image"]]
    for count in (2, 3, 4):
        assert_uniform([true_index(p) for p in asked if len(p["choices"]) == count], count)
    assert_uniform([truth(row) for row in entries["train"] if row["category"] == "shape"], len(scenes.SHAPES))
    assert_uniform([truth(row) for row in entries["train"] if row["category"] == "color"], 7)
    assert_uniform([truth(row) for row in entries["train"] if row["category"] == "sign color"], 8)
    assert_uniform([truth(row) for row in entries["train"] if row["category"] == "letter color"], 8)


def true_index(problem):
    return problem["choices"].index(problem["solution"].removeprefix("The answer is ").removesuffix("."))


def truth(row):
    return Counter(row["answers"]).most_common(1)[0][0].lower().rstrip(".").split()[-1]


def assert_uniform(values, kinds):
    counts, expected = Counter(values), len(values) / kinds
    assert len(counts) == kinds
    assert max(abs(n - expected) for n in counts.values()) < 4 * math.sqrt(expected)


def features(question, index):
    """What can be known about one choice without the picture."""
    choices, kind = question.choices, question.categories["category"]
    yield "question", question.question, choices[index]
    yield "set", kind, tuple(sorted(choices)), choices[index]
    yield "place", kind, len(choices), index
    words = choices[index].split()
    yield "shared", kind, len(choices), tuple(sum(w in c.split() for c in choices) for w in words)
    yield "asked", kind, tuple(word in question.question for word in words)
    yield from (("pair", kind, choices[index], other) for other in choices)
    if choices[index].isdigit():
        yield "rank", kind, len(choices), sorted(map(int, choices)).index(int(choices[index]))


def test_a_blind_model_stays_at_chance(root):
    """Naive Bayes on everything but the picture. The standard error of 900 questions is 1.6 points."""
    right, wrong = Counter(), Counter()
    for question in read_questions("scienceqa", root / "scienceqa", "train"):
        for index in range(len(question.choices)) if question.images else ():
            (right if index == question.answer_index else wrong).update(features(question, index))
    hits, chance, asked = 0, 0.0, 0
    for question in read_questions("scienceqa", root / "scienceqa", "test"):
        if question.images:
            count = len(question.choices)
            scores = [
                sum(math.log((right[f] + 1) / (wrong[f] + count - 1)) for f in features(question, i))
                for i in range(count)
            ]
            hits += scores.index(max(scores)) == question.answer_index
            chance, asked = chance + 1 / count, asked + 1
    assert asked > 800
    assert abs(hits - chance) / asked < 0.05


def test_the_caption_answers_the_questions(root, problems):
    """Who sees the scene answers all questions about it, up to the annotators' joint mistakes."""
    captions = captions_of(root, "test")
    asked = [(pid, p) for pid, p in problems.items() if p["image"] and p["split"] == "test"]
    hits = []
    for pid, problem in asked:
        caption = captions[(root / f"scienceqa/images/test/{pid}/image.png").read_bytes()]
        hits.append(solve(caption, problem) == problem["choices"][problem["answer"]])
    assert len(hits) > 800
    assert sum(hits) / len(hits) > 0.97


def solve(caption, problem):
    """The answer to a problem from the caption of its picture."""
    count, color, things, places = re.match(r"(\d) (\w+) (\w+): ([\w, ]+)\.", caption).groups()
    shape = next(s for s in scenes.SHAPES if things in (s, scenes.plural_of(s)))
    kind = problem["category"]
    if kind == "sign":
        return re.search(r"letters: (\w+)\.", caption)[1]
    if kind == "legend":
        return re.search(rf"a {shape} means ([\w ]+)\.", problem["hint"])[1]
    return {"color": color, "shape": shape, "count": count, "place": places.split()[1]}[kind]


# ---- annotators


def test_annotators_agree_as_documented(problems):
    """75 % right, each independently; a train label is one annotator's, a test label the majority's."""
    for split in ("train", "test"):
        rows = of_split(problems, split)
        truths = [true_index(p) for p in rows]
        right = sum(a == t for p, t in zip(rows, truths, strict=True) for a in p["answers"])
        assert right / (10 * len(rows)) == pytest.approx(0.75, abs=0.02)
        labels = sum(p["answer"] == t for p, t in zip(rows, truths, strict=True)) / len(rows)
        assert labels == pytest.approx(0.75, abs=0.04) if split == "train" else labels > 0.97
        both = [(p["answers"][0] == t, p["answers"][1] == t) for p, t in zip(rows, truths, strict=True)]
        assert sum(a and b for a, b in both) / len(both) == pytest.approx(0.75**2, abs=0.05)
    assert all(p["answer"] == p["answers"][0] for p in of_split(problems, "train"))


def test_perfect_annotators_always_agree(tmp_path):
    write_sample_set(tmp_path / "set", sizes=TINY, annotator_accuracy=1.0)
    problems = json.loads((tmp_path / "set/scienceqa/problems.json").read_text(encoding="utf-8"))
    assert all(set(p["answers"]) == {p["answer"]} for p in problems.values())


def test_mistakes_are_those_that_people_make():
    rng = random.Random(0)
    mistakes = Counter(annotators.opinion(rng, "red", scenes.OBJECT_COLORS, 0.5) for _ in range(4000))
    assert mistakes["red"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert mistakes["orange"] / 4000 == pytest.approx(0.5 * (0.8 + 0.2 / 6), abs=0.03)
    read = {annotators.misread(rng, "47") for _ in range(200)}
    assert all(number.isdigit() and number != "47" for number in read)


def test_ties_of_annotators_go_to_the_truth():
    assert annotators.majority([0, 0, 1, 1, 2], truth=1) == 1
    assert annotators.majority([0, 0, 2, 2, 1], truth=1) == 0


# ---- pictures


def test_the_picture_shows_what_the_scene_says():
    rng = random.Random(7)
    for _ in range(50):
        scene = scenes.draw_scene(rng, 0.8)
        picture = scenes.render_scene(scene)
        assert picture.size == (64, 64) and picture.mode == "RGB"
        for thing in scene.things:
            centre = picture.getpixel((thing.x + thing.size // 2, thing.y + thing.size // 2))
            assert centre == scenes.COLOR_VALUES[thing.color]
        if scene.sign:
            s = scene.sign
            box = (s.x, s.y, s.x + s.width, s.y + scenes.SIGN_HEIGHT)
            assert 0 <= box[0] and box[2] <= 64 and 0 <= box[1] and box[3] <= 64
            colors = {color for _, color in picture.crop(box).getcolors()}
            assert {scenes.COLOR_VALUES[s.fill], scenes.COLOR_VALUES[s.letters]} <= colors


def test_things_and_sign_do_not_overlap():
    rng = random.Random(8)
    for _ in range(200):
        scene = scenes.draw_scene(rng, 0.8)
        boxes = [(t.x, t.y, t.x + t.size, t.y + t.size) for t in scene.things]
        if scene.sign:
            s = scene.sign
            boxes.append((s.x, s.y, s.x + s.width, s.y + scenes.SIGN_HEIGHT))
        for i, a in enumerate(boxes):
            assert min(a) >= 0 and max(a) <= 64
            for b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_every_word_and_number_looks_different():
    texts = scenes.WORDS + scenes.NUMBERS
    assert len(scenes.WORDS) == len(set(scenes.WORDS)) >= 12
    assert len({scenes._text_mask(text).tobytes() for text in texts}) == len(texts)
    assert scenes._text_mask("bull").height >= 9


def test_writings_tell_what_the_scenes_show(tmp_path, monkeypatch):
    write_sample_set(tmp_path / "writings", sizes={"train": 30}, of="writings")
    write_sample_set(tmp_path / "sample", sizes={"train": 30})
    rows = [json.loads(line) for line in (tmp_path / "writings" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 30
    told = [json.loads(line) for line in (tmp_path / "sample" / "captions" / "train.jsonl").read_text().splitlines()]
    captions = {(tmp_path / "sample" / row["image"]).read_bytes(): row["answer"] for row in told if "textvqa" in row["id"]}
    for row in rows:
        caption = captions[(tmp_path / "writings" / row["image"]).read_bytes()]  # the same scenes, pixel by pixel
        kind = row["id"].partition("-")[2]
        if kind == "described":
            text, _, answer = row["answer"].partition("\nAnswer: ")
            assert text == caption and row["question"].endswith("\nDescribe, then answer.")
        elif kind == "listed":
            text, _, answer = row["answer"].partition("\nAnswer: ")
            assert len(text.splitlines()) == int(caption[0]) + 1
            assert set(scenes.things(text)) == set(scenes.things_of_caption(caption))
        else:
            written = json.loads(row["answer"])
            answer = written["answer"]
            assert written.keys() == {"question", "answer"} and written["question"].endswith("?")
        assert scenes.things(answer)[0] in scenes.things(caption)
    likes = [row for row in rows if row["id"].endswith("asked like")]
    assert all(("sign" in json.loads(row["answer"])["question"]) == ("sign" in row["question"]) for row in likes)
    with pytest.raises(DataError, match="holds another sample"):
        write_sample_set(tmp_path / "writings", sizes={"train": 30})


def test_statements_are_true_where_they_say_so(tmp_path):
    write_sample_set(tmp_path / "statements", sizes={"train": 40}, of="statements")
    write_sample_set(tmp_path / "sample", sizes={"train": 40})
    rows = [json.loads(line) for line in (tmp_path / "statements" / "train.jsonl").read_text().splitlines()]
    told = [json.loads(line) for line in (tmp_path / "sample" / "captions" / "train.jsonl").read_text().splitlines()]
    captions = {(tmp_path / "sample" / row["image"]).read_bytes(): row["answer"] for row in told if "textvqa" in row["id"]}
    wrong = []
    for row in rows:
        caption = captions[(tmp_path / "statements" / row["image"]).read_bytes()]
        kind, text = row["id"].partition("-")[2], row["question"].partition("\n")[0]
        holds = _holds(row["answer"] if kind == "said" else text, caption)
        assert holds == (kind != "false"), (row, caption)
        assert row["answer"] == {"true": "yes", "false": "no"}.get(kind, row["answer"])
        wrong += [text] if kind == "false" else []
    assert len(rows) == 3 * 40 and len(set(wrong)) > 20
    write_sample_set(tmp_path / "again", sizes={"train": 10}, of="statements")
    assert (tmp_path / "again" / "train.jsonl").read_text().splitlines() == [json.dumps(row) for row in rows[:30]]
    write_sample_set(tmp_path / "other", seed=1, sizes={"train": 40}, of="statements")
    assert (tmp_path / "other" / "train.jsonl").read_text() != (tmp_path / "statements" / "train.jsonl").read_text()
    with pytest.raises(DataError, match="holds another sample"):
        write_sample_set(tmp_path / "statements", sizes={"train": 40}, of="writings")
    with pytest.raises(DataError, match="of is 'pictures'"):
        write_sample_set(tmp_path / "new", of="pictures")


def _holds(statement, caption):
    """Whether a caption of a whole picture bears a statement out, read word by word."""
    head, _, sign = caption.partition(". ")
    objects = head.partition(":")[0]
    if statement.startswith("The color of the sign"):
        return sign.split()[0] == statement[:-1].split()[-1]
    if statement.startswith("The color of the letters"):
        return sign.partition(", ")[2].split()[0] == statement[:-1].split()[-1]
    if statement.startswith("The text"):
        return sign[:-1].split()[-1] == statement[:-1].split()[-1]
    if statement.startswith("There"):
        return statement[:-1].partition(" are " if " are " in statement else " is ")[2] == objects
    _, name, _, color = statement[:-1].split()
    return objects.split()[1:] == [color, name]

"""Systems made of cards and checks: what they keep of made-up answers, stage by stage, as their recipes have them."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from writers import TableAuthor, rows_in, samples_of, stage_of

from mmkd.data.formats import read_split
from mmkd.data.samples import ImageRef, Question, Sample, Turn
from mmkd.recipes.reading import load_recipe
from mmkd.writing.stage import write

RECIPES = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "write"
OWN = ("by", "data", "kind", "context")  # of a recipe's stage, in place of which the tests give authors and samples


def of_recipe(recipe, stage, samples, author):
    """A stage of a recipe, with made-up samples and author."""
    spec = load_recipe(RECIPES / f"{recipe}.yaml").writes[stage].model_dump(mode="json", by_alias=True)
    keys = {key: value for key, value in spec.items() if key not in (*OWN, "form", "row") and value is not None}
    return stage_of(samples, [author], **keys)


def written(folder):
    """What a stage wrote, as the samples of the next."""
    found = []
    for question in read_split("jsonl", folder, "train", files=None, target="first"):
        turns = (Turn("user", question.question, len(question.images)), Turn("assistant", question.answer))
        found.append(Sample(question.id, tuple(question.images), turns, {"question": question}))
    return found


@pytest.fixture
def pairs(tmp_path):
    """Samples of two pictures each, a red and a blue one."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    both = tuple(ImageRef(tmp_path, f"{name}.png") for name in ("red", "blue"))
    questions = [Question(f"s{n}", "what?", images=both) for n in range(4)]
    return [Sample(q.id, both, (Turn("user", "-", 2),), {"question": q}) for q in questions]


def test_fm2ds_keeps_what_no_document_alone_answers(tmp_path, pairs):
    asks = TableAuthor(lambda r: json.dumps({"question": f"what of {r.id}?", "answer": r.id}))
    asked = write(of_recipe("fm2ds", "ask", pairs[:1], asks), tmp_path / "ask")
    assert len(rows_in(asked)) == 1  # the second and third draw said the same
    names, both = ("needs both", "needs the first", "needs the second", "is never answered alike"), pairs[0].images
    made = [Question(name, name, answer=name, images=both) for name in names]
    questions = [Sample(one.id, both, (Turn("user", one.id, 2),), {"question": one}) for one in made]

    def answer(request):
        seen = {picture.load().getpixel((0, 0)) for picture in request.sample.images}
        first, second = (255, 0, 0) in seen, (0, 0, 255) in seen
        knows = {"needs both": first and second, "needs the first": first, "needs the second": second}
        return request.id if knows.get(request.id.split(" #")[0]) else "cannot tell"

    teacher, left = TableAuthor(answer), questions
    for stage, kept in (("both", 3), ("not_second", 2), ("not_first", 1)):
        folder = write(of_recipe("fm2ds", stage, left, teacher), tmp_path / stage)
        left = written(folder)
        assert len(left) == kept
    assert rows_in(folder)[0]["question"] == "needs both" and len(rows_in(folder)[0]["images"]) == 2  # the row has all documents


def test_a_picture_that_is_not_there_cannot_be_left_out(tmp_path, pairs):
    one = [Sample("s", pairs[0].images[:1], (Turn("user", "-", 1),), {"question": Question("s", "what?", answer="x")})]
    stage = stage_of([*one, *pairs[:1]], [TableAuthor(lambda r: "x")], prompt={"prompt": "what?", "pictures": {"without": 2}})
    assert [row["id"] for row in rows_in(write(stage, tmp_path))] == ["s0"]


def test_each_role_has_its_word_and_the_actor_says_the_label(tmp_path):
    rows = {}
    for stage in ("describe", "plan", "act"):
        right = {"s0": "0", "s1": "1"} if stage == "act" else {}
        author = TableAuthor(lambda r, right=right: right.get(r.id, "something of it"))
        rows[stage] = rows_in(write(of_recipe("roles", stage, samples_of(3), author), tmp_path / stage))
    assert [row["question"].partition(" what")[0] for row in (rows[s][0] for s in rows)] == [
        "You are the describer.", "You are the planner.", "You are the actor.",
    ]  # fmt: skip
    assert [row["answer"] for row in rows["act"]] == ["0", "1"]

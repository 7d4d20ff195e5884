"""CHAIR by hand: the words that stand for objects, and the rates over descriptions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from layouts import write_chair_coco

from mmkd.data import coco
from mmkd.data.coco import NO_OBJECT, coco_object, mentions
from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.tasks.chair import chair, unhallucinated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men ride motor bikes past a stop sign.", ["person", "motorcycle", "stop sign"]),
        ("A BABY elephant near the Passenger train", ["elephant", "train"]),  # no person
        ("a baby and its baby animals", ["person"]),
        ("wine glasses, knives & hot dogs", ["wine glass", "knife", "hot dog"]),
        ("the seats of the toilet", ["toilet"]),  # no chair
        ("a toilet seat, home plate and a bow tie", ["toilet", "tie"]),
        ("T-shirts, man-made lakes and police-men", []),  # a word with a hyphen is one word
        ("TVs, geese, mice, buses, puppies, ties, calves, skis and scissors",
         ["tv", "bird", "mouse", "bus", "dog", "tie", "cow", "skis", "scissors"]),
        ("children people women policemen oxen sheep", ["person"] * 4 + ["cow", "sheep"]),
        ("the dog's ball; a dog's dogs", ["dog", "sports ball", "dog", "dog"]),
        ("glass stove top oven, traffic lights", ["oven", "oven", "traffic light"]),
        ("", []),
    ],
)  # fmt: skip
def test_mentions(text: str, expected: list[str]) -> None:
    assert mentions(text) == expected


def test_the_table() -> None:
    table = yaml.safe_load(Path(coco.__file__).with_name("coco_objects.yaml").read_text(encoding="utf-8"))
    objects = table["objects"]
    names = [name for kind, others in objects.items() for name in (kind, *others)]
    assert len(objects) == 80 and len(names) == len(set(names)) == 401
    assert list(objects) == sorted(objects) and all(others == sorted(others) for others in objects.values())
    for kind, others in objects.items():
        for name in (kind, *others):
            assert mentions(f"It is a {name}, I think.") == [kind], name


def test_rates_by_hand() -> None:
    texts = ["A dog and a cat. The cat sleeps.", "A dog on a couch.", "Nice weather.", "A car."]
    objects = [["dog", "person"], ["couch", "dog"], ["bird"], [NO_OBJECT]]
    found = chair(texts, objects)
    assert found["mentions"] == 6 and found["named"] == 3
    assert found["chair_s"] == pytest.approx(2 / 4)
    assert found["chair_s_named"] == pytest.approx(2 / 3)
    assert found["chair_i"] == pytest.approx(3 / 6)  # cat, cat, car
    assert found["recall"] == pytest.approx(3 / 5)  # dog, couch, dog of five objects
    assert [unhallucinated(*pair) for pair in zip(texts, objects, strict=True)] == [0, 1, 1, 0]


def test_nothing_named_and_nothing_given() -> None:
    assert chair([""], [[NO_OBJECT]]) | {"named": 0} == dict.fromkeys(
        ("chair_s", "chair_s_named", "chair_i", "recall", "mentions", "named"), 0
    )
    for pair in (([], []), (["a"], [])):
        with pytest.raises(DataError, match="descriptions"):
            chair(*pair)
    with pytest.raises(DataError, match="'sofa'"):
        coco_object("sofa")


def test_objects_come_from_outlines_and_captions(tmp_path: Path, fake_tower) -> None:
    write_chair_coco(tmp_path / "coco")
    card = load_benchmark("chair_coco")
    by_id = {question.id: question.references for question in card.read(tmp_path)}
    assert by_id == {"42": ("dog", "person"), "7": (NO_OBJECT,)}
    tower = fake_tower({"42": "A dog, a man and a bottle.", "7": "The sky."})
    results = evaluate(tower, card, tmp_path / "out", data_root=tmp_path, progress=False)
    assert results["score"] == 0.5 and results["chair"]["chair_i"] == pytest.approx(1 / 3)
    assert results["chair"]["recall"] == 1.0 and results["rows_difference"]

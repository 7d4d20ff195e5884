"""What is found out about a run's data before it trains, and what training does with samples that cannot be used."""

import json

import pytest
import yaml
from tiny import VISIONS, tiny_picture, tiny_tower

from mmkd.errors import DataError
from mmkd.recipes.reading import load_recipe
from mmkd.runs.estimate import estimate
from mmkd.runs.plan import plan
from mmkd.runs.run import distill, table
from mmkd.runs.survey import Survey
from mmkd.towers.inputs import Seen
from mmkd.towers.prepare import Preparer
from mmkd.towers.tower import Tower
from mmkd.train.skips import Skip

COUNT = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_tower(0).save(folder / "student")
    # Four times as many visual tokens as the student has, and the same words.
    tiny_tower(1, 32, vision=VISIONS["vit"] | {"image_size": 32}, image_size=(32, 32)).save(folder / "teacher")
    return folder


@pytest.fixture
def recipe_of(models, tmp_path):
    """A function: changed rows by number, and overrides -> a recipe on COUNT rows."""
    (tmp_path / "data").mkdir()

    def make(changed: dict[int, dict] | None = None, *overrides: str):
        rows = []
        for number in range(COUNT):
            name = f"{number}.png"
            tiny_picture(tmp_path / "data", name, number)
            row = {"id": f"row{number}", "image": name, "question": "what is it?", "answer": "red round"}
            rows.append(row | (changed or {}).get(number, {}))
        (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "title": "odd samples", "output": str(tmp_path / "run"), "max_length": 120, "control": False,
            "teacher": {"model": str(models / "teacher")}, "student": {"model": str(models / "student")},
            "guards": {"teacher_is_better": False},
            "stages": {
                "only": {
                    "data": [{"format": "jsonl", "root": str(tmp_path / "data")}], "epochs": 1,
                    "terms": {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}},
                    "optimiser": {"batch_size": 4, "micro_batch_size": 1},
                }
            },
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(path, list(overrides))

    return make


def tower_lines(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if " over max_length " in line and "tokens" in line]
    return {role: next(line for line in lines if line.split()[0] == role) for role in ("student", "teacher")}


def test_the_dry_run_shows_how_long_samples_are_in_each_tower(recipe_of):
    text = plan(recipe_of({3: {"question": "what is that thing? " * 5}}, "max_length=200"))
    student, teacher = tower_lines(text).values()
    assert "visual 4 to 4" in student and "visual 16 to 16" in teacher
    assert "none over max_length" in student and "none over max_length" in teacher
    ends = {role: [int(line.split("tokens ")[1].split()[place]) for place in (0, 2)] for role, line in tower_lines(text).items()}
    low, high = ends["student"]
    assert high > low + 60 and ends["teacher"] == [low + 12, high + 12]
    assert f"{COUNT} samples, all prepared" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_is_too_long_is_named_and_left_out(recipe_of, tmp_path, caplog, workers):
    recipe = recipe_of({5: {"question": "what? " * 40}}, "guards.max_skipped_images=0.05", f"workers={workers}")
    text = plan(recipe)
    assert "1 over max_length 120" in text and "row5" in text
    assert "in the student: sample 'row5' has" in text
    assert recipe.guards.max_skipped == 0.05
    summary = distill(recipe)  # its micro-batch held nothing else
    (reason, count), = summary["skipped"]["student"]["only"].items()
    assert count == 1 and "tokens, more than max_length" in reason
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "log" / "student_skipped.jsonl").read_text().splitlines()]
    assert row["id"] == "row5" and row["stage"] == "only" and row["index"] == 5
    assert "left out 1 samples" in caplog.text or any("row5" in r.message for r in caplog.records)
    assert "no row of a log" not in caplog.text


def test_rows_that_cannot_be_used_are_in_the_record(recipe_of):
    recipe = recipe_of({5: {"video": "a.mp4"}})
    assert f"{COUNT - 1} samples, all prepared" in plan(recipe)
    summary = distill(recipe)
    assert summary["rows_left_out"] == {"only": {"key 'video' names a video; video is not supported": 1}}
    assert "rows of stage only that cannot be used: 1" in table(summary)


def test_the_cause_comes_first_where_only_one_tower_cuts_an_answer(recipe_of):
    # The answer fits behind the student's 4 visual tokens, not behind the teacher's 16.
    changed = {7: {"answer": "red round " * 9}}
    longest = int(tower_lines(plan(recipe_of(changed, "max_length=500")))["student"].split("tokens ")[1].split()[2])
    text = plan(recipe_of(changed, f"max_length={longest + 5}"))
    assert f"sample 'row7' has {longest + 12} tokens in the teacher, more than max_length {longest + 5}" in text
    assert "same tokenizer" not in text


def test_what_a_processor_raises_for_one_sample_is_a_skip(recipe_of, monkeypatch):
    encode = Preparer.encode

    def picky(self, sample, **options):
        if sample.id == "row9":
            raise RuntimeError("absolute aspect ratio must be smaller than 200, got 233.3")
        return encode(self, sample, **options)

    monkeypatch.setattr(Preparer, "encode", picky)
    recipe = recipe_of()
    assert "RuntimeError: absolute aspect ratio" in plan(recipe) and "row9" in plan(recipe)
    assert "ms each" in estimate(recipe)
    assert list(distill(recipe)["skipped"]["student"]["only"].values()) == [1]


def test_a_fault_of_every_sample_stops_the_run_with_its_reason(recipe_of, monkeypatch, tmp_path):
    def broken(self, sample, **options):
        raise TypeError("unexpected keyword argument 'images_kwargs'")

    monkeypatch.setattr(Preparer, "encode", broken)
    with pytest.raises(DataError, match=rf"{COUNT} in the student: sample cannot be prepared: TypeError: unexpected keyword"):
        distill(recipe_of({}, "guards.max_skipped=1"))
    assert not (tmp_path / "run" / "student").exists()


def test_more_than_the_limit_is_found_before_training(recipe_of, tmp_path):
    recipe = recipe_of({n: {"question": "what? " * 40} for n in (2, 11, 20)})
    with pytest.raises(DataError, match=r"3 of 24 samples cannot be used, more than the 1 that guards.max_skipped") as error:
        distill(recipe)
    assert all(name in str(error.value) for name in ("row2", "row11", "row20"))
    assert not list((tmp_path / "run").glob("**/model.safetensors"))


@pytest.mark.parametrize(
    ("samples", "looked_at", "bad", "least", "most"),
    [
        (67, 21, 1, 1, 1), (67, 67, 2, 2, 2), (100_000, 64, 0, 0, 0),
        (100_000, 64, 1, 1, 500), (100_000, 64, 8, 4_000, 12_500), (100_000, 64, 64, 90_000, 100_000),
    ],
)  # fmt: skip
def test_a_run_is_refused_for_what_a_few_samples_show_and_no_more(samples, looked_at, bad, least, most):
    skips = Survey("data", samples, tried=looked_at, skips=[Skip(0, "row", "too long", "it is too long")] * bad)
    missing = Survey("data", samples, searched=looked_at, missing=bad)
    for found in (skips, missing):
        assert least <= found.surely_left_out <= most and found.left_out == pytest.approx(samples * bad / looked_at)


def test_pictures_that_are_not_there_are_found_before_training(recipe_of, tmp_path):
    recipe = recipe_of({4: {"image": "gone.png"}})
    text = plan(recipe)
    assert "those of 1 of 24 samples" in text and str(tmp_path / "data" / "gone.png") in text
    with pytest.raises(DataError, match="those of 12 of 24 samples, the first is .*images/0.png. Looked for is"):
        plan(recipe_of({n: {"image": f"images/{n}.png"} for n in range(0, COUNT, 2)}))


def test_a_tower_that_no_picture_reaches_is_found_before_training(recipe_of, monkeypatch):
    see = Tower.see

    def grey(self, inputs):
        seen = see(self, inputs)
        blind = self.model.config.text_config.hidden_size == 32  # the teacher's
        return Seen(seen.features, [token * 0 for token in seen.tokens]) if blind else seen

    monkeypatch.setattr(Tower, "see", grey)
    with pytest.raises(DataError, match=r"stages.only.permuting the pictures changes nothing that the teacher computes"):
        plan(recipe_of())
    assert "tokens" in plan(recipe_of({}, "guards.pixels_matter=false"))

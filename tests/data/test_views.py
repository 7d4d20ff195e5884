"""Other views of pictures (HARD): what they show, that both towers share them, and which one the sampler takes."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_picture, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.data.lazy import Lazy
from mmkd.data.samplers.hard_views import HardViews, divergence, hardest
from mmkd.data.views import ViewedPicture, ViewsSpec, seen_of, with_views
from mmkd.errors import DataError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.run import distill
from mmkd.train.collate import PairDataset

WHOLE, PLAIN = (0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 1.0)


def test_a_view_is_a_part_in_the_wholes_size_with_other_colours(tmp_path):
    own = tiny_picture(tmp_path, "a.png", 1, (20, 16))
    picture = np.asarray(own.load(), float)
    assert np.array_equal(ViewedPicture(own, WHOLE, PLAIN).load(), picture)
    dark = np.asarray(ViewedPicture(own, WHOLE, (0.5, 1.0, 1.0)).load(), float)
    assert np.abs(dark - picture / 2).max() <= 1
    half = ViewedPicture(own, (0.5, 0.5, 1.0, 1.0), PLAIN)
    wanted = own.load().crop((10, 8, 20, 16)).resize((20, 16), 3)
    assert half.load().size == (20, 16) and np.abs(np.asarray(half.load(), float) - np.asarray(wanted, float)).mean() < 8
    assert len({half.key, own.key, ViewedPicture(own, WHOLE, PLAIN).key}) == 3


def test_copies_follow_from_seed_and_id_and_keep_the_answer(tmp_path):
    samples, spec = tiny_samples(tmp_path, 5, text_only=2), ViewsSpec(copies=2)
    found = with_views(samples, spec, 0)
    assert [sample.id for sample in found[:3]] == [samples[0].id, f"{samples[0].id} view 1", f"{samples[0].id} view 2"]
    assert len(found) == 5 * 3 + 2 and [s for s in found if seen_of(s.id) == s.id] == list(samples)
    assert all((s.turns, s.meta) == (found[0].turns, found[0].meta) for s in found[1:3])
    assert with_views(samples, spec, 0) == found != with_views(samples, spec, 1) and with_views(samples, None, 0) is samples
    boxes = [s.images[0].box for s in found if s.images and isinstance(s.images[0], ViewedPicture)]
    assert len(set(boxes)) == 10 and 0 <= min(map(min, boxes)) and max(map(max, boxes)) <= 1
    assert all(box[2] - box[0] >= 0.8 - 1e-9 and box[3] - box[1] >= 0.8 - 1e-9 for box in boxes)
    same = with_views(samples[:1], ViewsSpec(copies=1, crop=1, colour=0), 0)[1].images[0]
    assert np.array_equal(same.load(), samples[0].images[0].load())
    with pytest.raises(DataError, match="too large to have copies"):
        with_views(Lazy(samples, lambda sample: sample), spec, 0)


def test_both_towers_prepare_the_same_view(tmp_path):
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_tower(1, 16, tokenizer=tokenizer), tiny_tower(2, 32, tokenizer=tokenizer)
    plain, view = with_views(tiny_samples(tmp_path, 1), ViewsSpec(copies=1), 0)
    pair = PairDataset([view], student, teacher, [])[0]
    whole, other = (student.encode(sample, pictures=[sample.images[0].load()]) for sample in (view, plain))
    for encoded in (pair.student, pair.teachers["teacher"].inputs):
        assert all(torch.equal(encoded.pixels[name], whole.pixels[name]) for name in whole.pixels)
    assert any(not torch.equal(other.pixels[name], whole.pixels[name]) for name in whole.pixels)


# ---- which one is taken -----------------------------------------------------------------------------------------------------

# A picture and two views: on the first the student is far off and the teacher holds, on the second both are further apart but the
# teacher itself has changed its mind.
TEACHER = np.array([[0.9, 0.1], [0.85, 0.15], [0.05, 0.95]])
STUDENT = np.array([[0.8, 0.2], [0.3, 0.7], [0.99, 0.01]])


def test_the_objective_by_hand():
    kl = lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))  # noqa: E731
    assert divergence(TEACHER[0], STUDENT[1]) == pytest.approx(kl(TEACHER[0], STUDENT[1]), rel=1e-12)
    for stability in (0.0, 0.5, 1.0, 3.0, 1e6):
        values = [kl(p, q) - stability * kl(TEACHER[0], p) for p, q in zip(TEACHER, STUDENT, strict=True)]
        assert hardest(TEACHER, STUDENT, [0, 1, 2], stability) == values.index(max(values))
    found = [hardest(TEACHER, STUDENT, [0, 1, 2], stability) for stability in (0.0, 3.0, 1e6)]
    assert found == [2, 1, 0]  # without stability the one that nobody understands; with endless stability the picture itself
    assert hardest(TEACHER, TEACHER, [0, 1, 2], 1.0) == hardest(TEACHER, TEACHER, [0, 1, 2], 0.0) == 0  # no disagreement


def test_one_view_of_each_sample_is_seen(tmp_path):
    samples = with_views(tiny_samples(tmp_path / "p", 4), ViewsSpec(copies=2), 0)
    rows = [{"id": s.id, "teacher_probabilities": TEACHER[n % 3].tolist(), "probabilities": STUDENT[n % 3].tolist()}
            for n, s in enumerate(samples)]  # fmt: skip
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = HardViews(str(tmp_path / "scores.jsonl"), stability=3.0).build(samples, [12], 4, 0)
    assert sorted(order) == [1, 4, 7, 10]
    with pytest.raises(DataError, match="4 samples have views, fewer than batch_size 8"):
        HardViews(str(tmp_path / "scores.jsonl")).build(samples, [12], 8, 0)
    with pytest.raises(DataError, match="no sample has other views"):
        HardViews(str(tmp_path / "scores.jsonl")).build(samples[::3], [4], 4, 0)


def test_a_run_takes_them(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_tower(5, 16, tokenizer=tokenizer).save(tmp_path / "teacher")
    tiny_tower(6, 16, tokenizer=tokenizer).save(tmp_path / "student")
    for n in range(8):
        tiny_picture(tmp_path / "data", f"{n}.png", n)
    rows = [{"id": str(n), "image": f"{n}.png", "question": "what?", "answer": "red"} for n in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"format": "jsonl", "root": str(tmp_path / "data"), "views": {"copies": 2}}
    stage = {"data": [entry], "steps": 2, "terms": {"forward_kl": 1}, "sampler": "hard_views", "optimiser": {"batch_size": 4}}
    raw = {"title": "t", "output": str(tmp_path / "run"), "stages": {"only": stage}, "controls": False,
           "teacher": {"model": str(tmp_path / "teacher")}, "student": {"model": str(tmp_path / "student")},
           "guards": {"pixels_matter": False, "teacher_is_better": False}}  # fmt: skip
    distill(validate(raw, "test", Recipe))
    assert (tmp_path / "run" / "student").is_dir()

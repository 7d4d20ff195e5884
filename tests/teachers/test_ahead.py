"""The teacher's pass over the next micro-batch: once for each, begun before the student's step, and nothing else changes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tiny import make_term, tiny_samples, tiny_tokenizer, tiny_tower
from transformers import set_seed

from mmkd.errors import RecipeError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.terms.term import Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.spec import StageSpec
from mmkd.train.trainer import DistillTrainer, training_arguments

KINDS = (
    ("cross_entropy", "response"), ("forward_kl", "response"), ("jsd", "visual"), ("relation", "visual"),
    ("feature_match", "visual"),
)
OPTIMISER = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2}


def trained(folder, towers, ahead, kinds=KINDS, watch=None, **stage):
    """A student's weights after a stage of 14 samples: four steps an epoch, of two micro-batches and at the end of one."""
    student, teacher = deepcopy(towers)
    terms = [make_term(f"{kind}_{positions}", kind, Schedule(1.0, 0.5), positions) for kind, positions in kinds]
    data = [{"format": "jsonl", "root": "data"}]
    spec = StageSpec.model_validate(
        {"data": data, "terms": {"cross_entropy": 1.0}, "epochs": 2, "optimiser": OPTIMISER} | stage
    )
    dataset = PairDataset(tiny_samples(folder, 11, text_only=3), student, teacher, terms)
    distiller = Distiller(student, teacher, terms)
    if watch is not None:
        watch(distiller)
    set_seed(3)
    trainer = DistillTrainer(
        distiller, dataset, spec, training_arguments(spec, "one", folder / "out", 3, 1), folder / "log.jsonl", ahead=ahead
    )
    trainer.train()
    return {name: p.detach().cpu() for name, p in distiller.named_parameters()}


def towers(device="cpu", alike=False):
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_tower(1, 16, tokenizer=tokenizer), tiny_tower(2, 32, tokenizer=tokenizer)
    if alike:
        teacher.vision.load_state_dict(student.vision.state_dict())
        for p in student.vision.parameters():
            p.requires_grad_(False)
    for tower in (student, teacher):
        tower.model.to(device)
    return student, teacher


@pytest.mark.parametrize("stage", [{}, {"precision": "bfloat16"}, {"epochs": None, "steps": 4}], ids=["epochs", "bf16", "steps"])
def test_the_student_is_the_same_to_the_bit(tmp_path, stage):
    given = towers()
    plain, ahead = (trained(tmp_path, given, ahead, **stage) for ahead in (False, True))
    before = dict(Distiller(*given, []).named_parameters())
    assert any(not torch.equal(plain[name], before[name]) for name in before)
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_where_terms_compare_features_alone_the_teacher_reads_nothing(tmp_path):
    given, kinds = towers(), (KINDS[0], KINDS[-1])
    given[1].read = None
    plain, ahead = (trained(tmp_path, given, ahead, kinds) for ahead in (False, True))
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_a_shared_encoder_still_runs_once(tmp_path):
    looks = {"student": 0, "teacher": 0}

    def watch(distiller):
        for name, tower in (("student", distiller.tower), ("teacher", distiller.teachers["teacher"].tower)):
            def count(module, *_, name=name):
                looks[name] += 1
            tower.vision.register_forward_hook(count)

    given = towers(alike=True)
    found, counts = [], []
    for ahead in (False, True):
        looks |= {"student": 0, "teacher": 0}
        found.append(trained(tmp_path, given, ahead, watch=watch))
        counts.append(dict(looks))
    asked = counts[0]["teacher"]  # to find out that both see alike
    assert asked == 1 and counts[0]["student"] > 6
    assert counts[1] == {"student": asked, "teacher": counts[0]["student"]}
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_each_pass_is_made_once_and_a_micro_batch_early(tmp_path):
    done = []

    def watch(distiller):
        passed, forward = distiller.prefetch, distiller.forward

        def prefetch(batch):
            done.append(("teacher", tuple(batch.student.ids)))
            return passed(batch)

        def step(batch, *arguments):
            done.append(("student", tuple(batch.student.ids)))
            return forward(batch, *arguments)

        distiller.prefetch, distiller.forward = prefetch, step

    trained(tmp_path, towers(), True, watch=watch, epochs=None, steps=5)
    assert [batch for who, batch in done if who == "teacher"] == [batch for who, batch in done if who == "student"]
    whole, cut = "T TS TS TS TS TS TS S", "T TS S"  # an epoch of seven micro-batches; a step of another, and none after the last
    assert "".join(who[0].upper() for who, _ in done) == (whole + cut).replace(" ", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_stream_of_its_own(tmp_path):
    given = towers("cuda")
    plain, ahead = (trained(tmp_path, given, ahead) for ahead in (False, True))
    assert all(torch.allclose(plain[name], ahead[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize(("teacher", "term", "why"), [
    ({"cache": "folder"}, {"kind": "forward_kl"}, "made its passes already"),
    ({}, {"kind": "dbild", "path": "switch"}, "stages.one.terms.kd"),
])  # fmt: skip
def test_what_cannot_go_ahead_is_refused(teacher, term, why):
    raw = {
        "title": "t", "output": "o", "teacher": {"model": "m", "ahead": True} | teacher, "student": {"model": "s"},
        "stages": {"one": {"data": [{"format": "jsonl", "root": "data"}], "terms": {"kd": term}, "steps": 1}},
    }
    with pytest.raises(RecipeError, match=why):
        validate(raw, "recipe", Recipe)

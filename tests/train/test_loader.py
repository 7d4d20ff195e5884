"""The batches of a stage: those that transformers' trainer would make itself."""

from __future__ import annotations

import sys

import pytest
from tiny import make_term, tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tower
from transformers import Trainer, set_seed

from mmkd.terms.term import Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.spec import StageSpec
from mmkd.train.trainer import DistillTrainer, progress_at, training_arguments


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_trainer_that_it_extends(tmp_path, grouped, workers):
    tower, terms = tiny_tower(1), [make_term("cross_entropy", "cross_entropy", Schedule(1.0, 1.0))]
    dataset = PairDataset(tiny_samples(tmp_path, 11), tower, None, terms, workers=workers)
    stage = StageSpec.model_validate({
        "data": [{"format": "jsonl", "root": "data"}], "terms": {"cross_entropy": 1.0}, "steps": 5,
        "optimiser": {"batch_size": 4}, "group_by_length": grouped,
    })  # fmt: skip
    arguments = training_arguments(stage, "one", tmp_path / "out", 3, 1, workers)
    trainer = DistillTrainer(Distiller(tower, None, terms), dataset, stage, arguments, tmp_path / "log.jsonl")

    def order(loader):
        return [inputs["batch"].student.ids for inputs in loader]

    set_seed(3)
    ours = order(trainer.get_train_dataloader())
    set_seed(3)
    assert ours == order(Trainer.get_train_dataloader(trainer))
    assert len(ours) == 2 and len({name for batch in ours for name in batch}) == 8  # whole batches only


def test_a_scheduled_weight_reaches_its_end():
    """Over ten steps from 0 to 1 the last one has 1; a stage of one step has the end at once."""
    schedule = Schedule(0.0, 1.0)
    weights = [schedule.at(progress_at(step, 10)) for step in range(10)]
    assert weights[0] == 0 and weights[-1] == 1 and weights == sorted(weights) and len(set(weights)) == 10
    assert schedule.at(progress_at(0, 1)) == 1
    assert [Schedule(0.0, 1.0, over=0.5).at(progress_at(step, 3)) for step in range(3)] == [0.0, 1.0, 1.0]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_what_a_model_raises_for_a_picture_names_the_samples(tmp_path, monkeypatch):
    student, samples = tiny_tower(1, 16), tiny_samples(tmp_path, 4)
    trainer = tiny_stage_trainer(tmp_path, tiny_stage(student, None, samples, {"cross_entropy": 1.0}))

    def see(inputs):
        raise RuntimeError("split_with_sizes expects other sizes")

    monkeypatch.setattr(student, "see", see)
    with pytest.raises(RuntimeError, match="other sizes") as raised:
        trainer.train()
    (note,) = raised.value.__notes__
    assert sum(sample.id in note for sample in samples) == 2 and "tokens with padding" in note

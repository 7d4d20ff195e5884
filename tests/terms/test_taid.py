"""TAID as a term: its loss, its state over steps and ranks, and a run that is killed and resumed."""

import pytest
import torch
from objectives import (
    TOKENIZER,
    assert_equals,
    assert_micro_batches_add_up,
    assert_refused_by_top_k,
    assert_refused_options,
    batch_of,
    term,
    towers,
)
from safetensors.torch import load_file
from tiny import tiny_samples, tiny_tower
from transformers import TrainerCallback

from mmkd.losses import TAIDSchedule
from mmkd.terms.state import ExactState
from mmkd.train.checkpoints import last_checkpoint
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.spec import StageSpec
from mmkd.train.trainer import WEIGHTS, DistillTrainer, training_arguments


def reference(t):
    def mean(zs, zt, targets):
        p = ((1 - t) * zs.detach() + t * zt).softmax(-1)
        return -(p * zs.log_softmax(-1)).sum(-1).mean()

    return mean


@pytest.mark.parametrize("t", [0.4, 0.9])
def test_it_equals_a_plain_computation(tmp_path, t):
    assert_equals(tmp_path, term("taid", t_start=t), reference(t))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("taid"))


def test_what_it_refuses():
    assert_refused_by_top_k(term("taid"), "taid needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("taid", "t_start is 0.9 and t_end 0.5", t_start=0.9, t_end=0.5)
    assert_refused_options("taid", "taid carries a module of its own and cannot run on the visual switch", path="switch")


def test_the_state_survives_a_cast_to_half_precision():
    module = ExactState(TAIDSchedule().start())
    assert torch.equal(module.bfloat16().state, torch.tensor([0.4, 0.0, torch.inf], dtype=torch.float64))


def test_the_target_follows_the_state(tmp_path):
    """The state of the schedule is that of the loss that the log shows, and the next loss is computed with its t."""
    student, teacher = towers()
    own = term("taid", alpha=0.5)
    distiller, batch = Distiller(student, teacher, [own]), batch_of(student, teacher, tiny_samples(tmp_path, 2), [own])
    schedule, state, seen = TAIDSchedule(alpha=0.5), TAIDSchedule().start(), []
    for step in (1, 2, 3):
        _, log = distiller(batch)
        total, count = log["taid"]
        seen.append(float(total / count))
        own.update(distiller.extras["taid"], seen[-1], step / 4)
        state = schedule.next(state, seen[-1], step / 4)
        assert torch.equal(distiller.extras["taid"].state, state)
    assert float(state[0]) > 0.8 and seen[0] == seen[1] != seen[2]  # the first step only remembers its loss


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(folder, samples, micro=2):
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    own = [term("taid", alpha=0.5, beta=0.5), term("cross_entropy", 0.5)]
    dataset = PairDataset(samples, student, teacher, own)
    spec = StageSpec.model_validate({
        "data": [{"format": "jsonl", "root": "r"}], "terms": {"taid": 1.0}, "steps": 6, "log_every": 1, "save_every": 3,
        "optimiser": {"batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-3},
    })  # fmt: skip
    arguments = training_arguments(spec, "one", folder, 3, 1)
    return DistillTrainer(Distiller(student, teacher, own), dataset, spec, arguments, folder / "log.jsonl")


def test_killed_and_resumed_is_undisturbed(tmp_path):
    samples = tiny_samples(tmp_path / "data", 8)
    whole = trainer(tmp_path / "whole", samples)
    whole.train()
    killed = trainer(tmp_path / "killed", samples)
    killed.add_callback(Kill(3))
    with pytest.raises(Killed):
        killed.train()
    saved = load_file(tmp_path / "killed" / "checkpoint-3" / WEIGHTS)["extras.taid.bits"].view(torch.float64)
    assert saved[0] > 0.4 and saved[2].isfinite()
    resumed = trainer(tmp_path / "killed", samples)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "killed"))
    expected = whole.model.state_dict()
    assert expected["extras.taid.bits"].view(torch.float64)[0] > saved[0]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_micro_batches_move_the_target_as_one_batch_does(tmp_path):
    samples = tiny_samples(tmp_path / "data", 8)
    found = []
    for micro in (4, 2):
        own = trainer(tmp_path / str(micro), samples, micro)
        own.train()
        found.append(own.model.extras["taid"].state)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

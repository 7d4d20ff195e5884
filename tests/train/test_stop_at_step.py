"""SIGTERM ends training after the step that is under way, in a checkpoint; the same command goes on to the same weights."""

import os
import signal

import pytest
import torch
from tiny import tiny_tower, tiny_trainer
from transformers import TrainerCallback

from mmkd.base import stopping
from mmkd.base.stopping import Terminated
from mmkd.train.checkpoints import last_checkpoint
from mmkd.train.stop_at_step import ends_when_asked


@pytest.fixture
def listening():
    with stopping.listening():
        yield
    stopping._asked = False


class Asks(TrainerCallback):
    """What Slurm does, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def towers():
    return tiny_tower(0), tiny_tower(1).freeze()


def test_training_stops_in_a_checkpoint_and_goes_on_to_the_same_weights(tmp_path, listening):
    undisturbed = tiny_trainer(tmp_path / "a", towers(), steps=5)
    with ends_when_asked(undisturbed, "student"):
        undisturbed.train(resume_from_checkpoint=None)
    stopped = tiny_trainer(tmp_path / "b", towers(), steps=5)
    stopped.add_callback(Asks(2))
    told = pytest.raises(Terminated, match="student, stage sft stopped at step 3 of 5")
    with told, ends_when_asked(stopped, "student, stage sft"):
        stopped.train(resume_from_checkpoint=None)
    checkpoint = last_checkpoint(tmp_path / "b" / "stages")
    assert checkpoint.endswith("checkpoint-3")
    stopping._asked = False
    again = tiny_trainer(tmp_path / "b", towers(), steps=5)
    with ends_when_asked(again, "student"):
        again.train(resume_from_checkpoint=checkpoint)
    expected, found = undisturbed.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_outside_of_training_it_ends_at_once_and_inside_at_the_second_time(listening, monkeypatch):
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    stopping._asked = False
    with stopping.until_saved():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked()
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_ends_with_143(monkeypatch, capsys, listening):
    from types import SimpleNamespace

    import mmkd.cli as cli

    def run(arguments):
        raise Terminated("student, stage sft stopped at step 3 of 5, in a checkpoint")

    monkeypatch.setattr(cli, "_parse", lambda argv: SimpleNamespace(run=run, command=SimpleNamespace(prog="mmkd distill")))
    assert cli.main([]) == 143
    assert "stopped at step 3 of 5, in a checkpoint; the same command goes on" in capsys.readouterr().err

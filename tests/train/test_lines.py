"""What a training says while it runs."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
import torch
from tiny import tiny_tower, tiny_trainer

from mmkd.train import lines as module
from mmkd.train.lines import TrainingLines, in_numbers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "mmkd")
    return caplog


def trained(folder, steps=4, every=1, behind=None):
    trainer = tiny_trainer(folder, (tiny_tower(1), tiny_tower(2)), steps=steps)
    trainer.args.logging_steps = trainer.state.logging_steps = every
    lines = TrainingLines("student, stage sft", 4, [term.name for term in trainer.model.terms], behind)
    trainer.add_callback(lines)
    return trainer, lines


def test_a_line_has_what_one_wants_to_know(tmp_path, told, monkeypatch, capsys):
    monkeypatch.setattr(module, "EVERY", 0.0)
    trainer, _ = trained(tmp_path, behind=lambda pace: 3600.0)
    trainer.train()
    said = [line for line in told.messages if line.startswith("student, stage sft ")]
    shape = (
        r"student, stage sft {}/4: loss [\d.]+ \(cross_entropy [\d.]+, forward_kl [\d.e-]+\), gradient [\d.]+, rate [\d.e-]+, "
        r"[\d.,]+ samples/s, (GPU )?[\d.]+ GB, {}run about 1 h"
    )
    assert len(said) == 4
    for step, line in enumerate(said, start=1):
        assert re.fullmatch(shape.format(step, r"\d+ s left, " if step < 4 else ""), line), line
    loss, *terms = (float(value) for value in re.findall(r"(?:loss|cross_entropy|forward_kl) ([\d.e-]+)", said[-1]))
    assert loss == pytest.approx(sum(terms), rel=1e-3)
    assert re.fullmatch(r"student, stage sft: 4 steps in \d+ s, [\d.,]+ samples/s", told.messages[-1])
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "it/s" not in err  # neither dicts nor bars


def test_lines_come_every_few_seconds_and_at_the_end(tmp_path, told):
    trainer, _ = trained(tmp_path, steps=6)
    trainer.train()
    steps = [int(line.partition("/")[0].rpartition(" ")[2]) for line in told.messages if re.search(r" \d+/6: ", line)]
    assert steps == [1, 6]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6  # the log has every row


def test_an_error_finds_no_bar_in_its_way(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    trainer, lines = trained(tmp_path)
    trainer.finite.look = lambda: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert "student, stage sft" in terminal.getvalue()
    lines.close()
    assert terminal.getvalue().endswith("\r") and lines._bar is None


def test_numbers_are_short():
    logs = {"loss": 2.34567, "grad_norm": torch.tensor(1.234), "learning_rate": 1e-4, "ce": 2.345671, "epoch": 1.0}
    assert in_numbers(logs, ["ce"]) == ["loss 2.346", "gradient 1.23", "rate 0.0001"]  # the only term is the loss
    assert in_numbers({"loss": 3.0, "a": 1.0, "b": 2.0, "experts": {}}) == ["loss 3 (a 1, b 2)"]
    many = {"loss": 1.0} | {f"t{n}": 0.5 for n in range(9)}
    assert in_numbers(many)[0].endswith("t5 0.5 and 3 more)")


def test_the_rest_of_a_stage_is_timed_from_where_it_was_resumed(tmp_path, told, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "EVERY", 0.0)
    asked = []
    lines = TrainingLines("student", 8, behind=lambda pace: asked.append(pace) or 100.0)

    class State:
        global_step, max_steps, logging_steps, is_world_process_zero = 50, 100, 10, True

    lines.on_train_begin(None, State, None)
    now[0], State.global_step = 20.0, 60  # 2 s a step
    lines.on_log(None, State, None, {"loss": 1.0})
    assert " 4 samples/s" in told.messages[-1] and told.messages[-1].endswith("80 s left, run about 3 min")
    assert asked == [0.25]

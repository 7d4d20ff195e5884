"""Students in serving engines: the answers of a real vLLM, and what is said where it is not there or does not take a student.

With MMKD_VLLM=FOLDER (of `scripts/serve/install_vllm.sh`) it is asked.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from served_models import assembled, mixed_samples
from tiny import tiny_tower
from vllm_server import environment

from mmkd.cli import main
from mmkd.runs.engines import vllm
from mmkd.runs.export import FOR_VLLM, QUESTIONS, compare
from mmkd.towers.export import served_width, serving_remarks, with_wider_heads
from mmkd.towers.tower import Tower

REAL = pytest.mark.skipif(environment() is None, reason="no vLLM is installed (MMKD_VLLM)")


@pytest.fixture
def in_path(monkeypatch):
    monkeypatch.setenv("PATH", f"{environment()}/bin", prepend=":")


class Grey:
    """An engine that sees no picture."""

    def __init__(self, engine):
        self.engine = engine

    def ask(self, sample, prompt, picture):
        return self.engine.ask(sample, prompt, picture.point(lambda _: 128))


def equal(said: str) -> int:
    return int(said.partition(": ")[2].split()[0])


@REAL
@pytest.mark.parametrize(("kind", "encoder"), product(("qwen2", "qwen3", "llama"), ("clip_vision_model", "siglip_vision_model")))
def test_a_real_vllm_answers_as_transformers(tmp_path, capsys, in_path, kind, encoder):
    assembled(kind, encoder).save(tmp_path / "student")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert equal(said) == QUESTIONS and float(said.split()[-1]) < 1e-4


@REAL
def test_answers_without_the_picture_are_others(tmp_path, in_path):
    tower = assembled("qwen2").freeze()
    tower.save(tmp_path)
    with vllm(tmp_path, []) as engine:
        assert equal(next(compare(tower, Grey(engine), FOR_VLLM))) < QUESTIONS // 2


@REAL
def test_why_vllm_does_not_take_a_student_is_told(tmp_path, capsys, in_path):
    assembled("qwen3", head_dim=8).save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 2
    assert "head_dim=8" in capsys.readouterr().err


@REAL
def test_the_student_that_mmkd_brings_is_served(tmp_path, capsys, in_path):
    """FocalNet, and heads of 12."""
    student = Path(__file__).parents[2] / "models" / "sample-student"
    assert main(["export", str(student), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 0
    said = capsys.readouterr().out
    assert "attention heads are written 32 wide" in said and equal(said.splitlines()[-1]) == QUESTIONS


@pytest.mark.parametrize(("kind", "keys"), [("llama", 2), ("qwen2", 1), ("mistral", 2)])
def test_wider_heads_are_the_same_function(tmp_path, capsys, kind, keys):
    tower = assembled(kind, head_dim=12, num_key_value_heads=keys).freeze()
    with torch.no_grad():  # biases too
        for name, value in tower.model.named_parameters():
            if name.endswith("bias"):
                value.normal_(generator=torch.Generator().manual_seed(0))
    tower.save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm"]) == 0
    assert "attention heads are written 32 wide" in capsys.readouterr().out
    wide = Tower.load(tmp_path / "out").freeze()
    assert wide.model.config.get_text_config().head_dim == 32 and serving_remarks(wide.model) == []
    samples = mixed_samples(tmp_path, 4)
    rows = []
    for one in (tower, wide):
        inputs = one.collate([one.encode(sample) for sample in samples])
        with torch.no_grad():
            rows.append(one.read(inputs, one.see(inputs))[inputs.attention_mask.bool()])
    assert rows[0].abs().max() > 0.5
    torch.testing.assert_close(*rows, atol=2e-4, rtol=1e-4)
    assert with_wider_heads(wide.model) is wide.model


def test_heads_that_cannot_be_widened_stay(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for tower in (assembled("qwen3", head_dim=8), assembled("llama", head_dim=8, rope_parameters=scaled)):
        assert served_width(tower.model) is None and with_wider_heads(tower.model) is tower.model
        assert "8 wide" in serving_remarks(tower.model)[0]


def test_without_the_command_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    tiny_tower().save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 2
    assert "no command `vllm` in PATH" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_server_that_ends_at_once_is_told_of(tmp_path, capsys, monkeypatch):
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    tiny_tower().save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm", "--check"]) == 2
    said = capsys.readouterr()
    assert "ValueError: no such model" in said.err and Path(tmp_path / "out" / "config.json").exists()

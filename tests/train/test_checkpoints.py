"""Checkpoints: marked when every process has written its part, checked when training goes on, the older one if need be."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer

from mmkd.errors import DataError
from mmkd.train.checkpoints import COMPLETE, last_checkpoint, writing_checkpoint
from mmkd.train.trainer import DistillTrainer


def write(folder, step, main=True):
    with writing_checkpoint(folder, step, main):
        target = folder / f"checkpoint-{step}"
        (target / "parts").mkdir(parents=True)
        (target / "weights.safetensors").write_bytes(bytes(range(200)) * step)
        (target / "optimizer.pt").write_bytes(b"averages" * 50)
        (target / "parts" / "0.pt").write_bytes(b"part")


def test_the_mark_waits_for_the_parts_of_other_processes(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-3"
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial: folder.mkdir())
    trainer = object.__new__(DistillTrainer)
    trainer.args = SimpleNamespace(should_save=True, output_dir=str(tmp_path))
    trainer.state = SimpleNamespace(global_step=3)
    trainer.finite, trainer._whole = SimpleNamespace(look=lambda: None), lambda: None
    seen: list[list[Path]] = []
    trainer.accelerator = SimpleNamespace(wait_for_everyone=lambda: seen.append(list(folder.iterdir())))
    trainer._save_checkpoint(None, None)
    assert seen == [[]] and (folder / COMPLETE).exists()


def test_the_two_newest_stay_by_number_whatever_the_clock_says(tmp_path):
    import os

    for step in (8, 9, 10, 11):
        write(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - step, 1e9 - step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda folder: flip(folder / "weights.safetensors"),
    "zeroed": lambda folder: (folder / "optimizer.pt").write_bytes(bytes((folder / "optimizer.pt").stat().st_size)),
    "cut": lambda folder: (folder / "weights.safetensors").write_bytes(b"short"),
    "missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "a part missing": lambda folder: (folder / "parts" / "0.pt").unlink(),
    "an empty mark": lambda folder: (folder / COMPLETE).write_text(""),
    "a damaged mark": lambda folder: flip(folder / COMPLETE),
    "no list": lambda folder: (folder / COMPLETE).write_text("{}"),
    "interrupted": lambda folder: (folder / COMPLETE).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, damage, caplog):
    write(tmp_path, 2)
    write(tmp_path, 4)
    DAMAGES[damage](tmp_path / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert ("checkpoint-4 is damaged" in caplog.text) == (damage != "interrupted")
    write(tmp_path, 4)  # training comes here again
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_other_names_are_no_checkpoints(tmp_path):
    write(tmp_path, 2)
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-2-old", f"checkpoint-{'9' * 40}", "checkpoint-³"):
        (tmp_path / name).mkdir()
        (tmp_path / name / COMPLETE).write_text(json.dumps({}))
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_leaves_nothing_of_a_checkpoint(tmp_path, error):
    write(tmp_path, 2)
    words = r"no room for .*checkpoint-4: about 5\.0 MiB are needed, [\d,.]+ MiB are left"
    with pytest.raises(DataError, match=words), writing_checkpoint(tmp_path, 4, True, 5 * 2**20):
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "half").write_bytes(b"x")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_other_failures_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing_checkpoint(tmp_path, 4, True):
        raise RuntimeError("shapes do not fit")

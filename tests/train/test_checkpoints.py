"""A checkpoint is marked complete when every process has written its part."""

from pathlib import Path
from types import SimpleNamespace

from transformers import Trainer

from mmkd.train.trainer import COMPLETE, DistillTrainer


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

"""Training stops at the first value that is not finite, keeps the batch, and writes no weights."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import language_config, tiny_tower, tiny_trainer

from mmkd.errors import NotFiniteError
from mmkd.train.batch_file import load_batch
from mmkd.train.finite import GRADIENT, LOSS, FiniteWatch, Where


@pytest.fixture
def towers():
    return tiny_tower(0), tiny_tower(1, language=language_config(tie_word_embeddings=False)).freeze()


def test_a_teacher_that_overflows_stops_the_first_step_and_names_term_and_samples(tmp_path, towers):
    student, teacher = towers
    with torch.no_grad():
        teacher.head.weight.mul_(1e38)  # finite, but logits are not
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with pytest.raises(NotFiniteError, match=r"stage sft, step 1: not finite: forward_kl; samples s\d") as caught:
        tiny_trainer(tmp_path, towers).train()
    assert caught.value.code == 3 and "mmkd check" in str(caught.value)
    assert not list(tmp_path.glob("stages/checkpoint-*"))
    folder = tmp_path / "not_finite" / "student_sft_step1"
    report = json.loads((folder / "report.json").read_text())
    assert {"forward_kl", LOSS} <= set(report["not_finite"]) and len(report["counts"]) > 3
    kept = load_file(folder / "weights.safetensors")
    assert all(torch.equal(before[name.removeprefix("student.")], tensor) for name, tensor in kept.items()), "as before the step"
    batch = load_batch(folder / f"batch_{report['batches'][0]}")
    assert set(batch.student.ids) <= set(report["samples"])


def test_a_kept_batch_is_the_batch(tmp_path, towers):
    trainer = tiny_trainer(tmp_path, towers)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])["batch"]
    from mmkd.train.batch_file import save_batch

    save_batch(batch, tmp_path / "batch")
    again = load_batch(tmp_path / "batch")
    assert again.student.ids == batch.student.ids and torch.equal(again.counts, batch.counts)
    assert all(torch.equal(again.student.pixels[name], value) for name, value in batch.student.pixels.items())
    shared = batch.teachers["teacher"].inputs is batch.student
    assert (again.teachers["teacher"].inputs is again.student) is shared
    expected, found = trainer.model(batch)[0], trainer.model(again)[0]
    assert torch.equal(expected, found)


def test_weights_that_became_infinite_are_not_saved(tmp_path, towers):
    trainer = tiny_trainer(tmp_path, towers, max_grad_norm=0)
    trainer.stage.optimiser.learning_rate = 1e30  # more than a recipe may have
    with pytest.raises(NotFiniteError):
        trainer.train()
    assert not list(tmp_path.glob("stages/checkpoint-*/complete"))


def test_finite_training_keeps_nothing(tmp_path, towers):
    tiny_trainer(tmp_path, towers).train()
    assert not (tmp_path / "not_finite").exists() and list(tmp_path.glob("stages/checkpoint-4/complete"))


class Flag:
    """In the place of an accelerator's event."""

    def __init__(self):
        self.done, self.waited = False, 0

    def query(self):
        return self.done

    def synchronize(self):
        self.waited += 1


def test_flags_under_way_are_waited_for_only_when_asked(tmp_path, monkeypatch):
    """As on an accelerator: the answer to a step arrives later, and no step waits for it."""
    import mmkd.train.finite as finite

    events: list[Flag] = []

    def send(step):
        if step.arrived is None:
            events.append(Flag())
            step.arrived = (torch.cat([flag.reshape(-1) for flag in step.flags]), events[-1])

    monkeypatch.setattr(finite, "_send", send)
    watch = FiniteWatch(Where(tmp_path, "student", "sft"), lambda: None)
    monkeypatch.setattr(finite, "save_batch", lambda batch, path: path.write_text(batch))
    for step in (1, 2, 3, 4, 5, 6):
        loss = torch.tensor(float("inf") if step == 2 else 1.0)
        watch.losses(step, f"batch of step {step}", [f"sample {step}"], loss, {"kl": torch.ones(())})
        watch.gradient(torch.tensor(1.0))
    assert not any(event.waited for event in events)
    with pytest.raises(NotFiniteError, match=f"step 2: not finite: {LOSS}; samples sample 2"):
        watch.look()
    assert json.loads((tmp_path / "not_finite" / "student_sft_step2" / "report.json").read_text())["batches"] == []


def test_a_gradient_alone_is_told_with_all_samples_of_its_step(tmp_path, monkeypatch):
    import mmkd.train.finite as finite

    monkeypatch.setattr(finite, "save_batch", lambda batch, path: path.write_text(batch))
    watch = FiniteWatch(Where(tmp_path, "control", "sft"), lambda: None)
    watch.losses(7, "a", ["x"], torch.ones(()), {})
    watch.losses(7, "b", ["y"], torch.ones(()), {})
    with pytest.raises(NotFiniteError, match=f"control, stage sft, step 7: not finite: {GRADIENT}; samples x, y"):
        watch.gradient(torch.tensor(float("nan")))
    kept = (tmp_path / "not_finite" / "control_sft_step7").iterdir()
    assert sorted(path.name for path in kept) == ["batch_0", "batch_1", "report.json"]

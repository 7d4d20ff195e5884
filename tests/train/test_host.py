"""Nothing in a step waits for the accelerator: "meta" tensors have no values, so whatever asks for one raises."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import make_term, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.engine.positions import gathered, spread
from mmkd.terms.term import Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller

TERMS = {
    "divergences": [("cross_entropy", "prompt", "student"), ("forward_kl", "visual", "student"), ("dbild", "response", "switch")],
    "pictures": [(kind, "response", "student") for kind in ("relation", "feature_match", "contrastive", "tags")],
}


@pytest.mark.parametrize("chosen", TERMS)
def test_a_step_asks_no_value_of_the_device(tmp_path, monkeypatch, chosen):
    # Two questions that transformers asks: whether placeholders and tokens are as many, and (SDPA) whether anything is padded.
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # there is none for "meta"
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_tower(1, 16, tokenizer=tokenizer), tiny_tower(2, 32, tokenizer=tokenizer)
    terms = [make_term(kind, kind, Schedule(1, 1), positions, path) for kind, positions, path in TERMS[chosen]]
    dataset = PairDataset(tiny_samples(tmp_path, 3, text_only=1), student, teacher, terms)
    batch = dataset.collator([dataset[i] for i in range(len(dataset))])["batch"]
    distiller = Distiller(student, teacher, terms)
    for tower in (student, teacher):
        assert tower.logit_rule == (1.0, None)  # measured once, before training
        tower.model.set_attn_implementation("eager")
        tower.model.to("meta")
    distiller.to("meta").train()
    loss, log = distiller(batch.to("meta"))
    loss.backward()
    assert loss.device.type == "meta" and len(log) == len(terms)
    assert all(count.device.type == "cpu" for _, count in log.values())


def test_rows_are_gathered_in_order_and_spread_back():
    hidden = torch.arange(24.0).reshape(2, 4, 3).requires_grad_()
    where = torch.tensor([[False, True, False, True], [True, False, False, False]])
    rows = gathered(hidden, where)
    assert torch.equal(rows, hidden[where])
    rows.sum().backward()
    assert torch.equal(hidden.grad, where[..., None].expand(2, 4, 3).float())
    places = torch.tensor([True, False, True, True])
    assert torch.equal(spread(rows, places)[places], rows) and not spread(rows, places)[~places].any()


PROCESS = """
import sys
from types import SimpleNamespace

import torch

from mmkd.train.trainer import DistillTrainer

rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/group", rank=rank, world_size=2)
trainer = object.__new__(DistillTrainer)
trainer.args, trainer.stop = SimpleNamespace(world_size=2), SimpleNamespace()
samples = [{"batch": SimpleNamespace(counts=torch.full((3,), 1.0 + rank))}] * 2
for _ in range(2):
    counts = trainer._get_num_items_in_batch(samples, torch.device("meta"))
print(counts.tolist())
torch.distributed.destroy_process_group()
"""


def test_counts_are_added_up_between_the_cpus_of_processes(tmp_path):
    """Each of two processes has the sum over both and over its two micro-batches."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [process.communicate(timeout=240)[0].strip() for process in started] == ["[6, 6, 6]"] * 2

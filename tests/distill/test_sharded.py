"""FSDP2 on two CPU processes: the weights of one process, text-only micro-batches on one rank only, saved whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_samples, tiny_tower

from mmkd.distill.collate import PairDataset
from mmkd.distill.distiller import Distiller
from mmkd.distill.sharded import is_sharded, replace_weights
from mmkd.distill.terms import Schedule, Term
from mmkd.launched import end_process

KINDS = ("cross_entropy", "forward_kl", "relation", "feature_match")
STEPS = 3


def distiller_of(folder: Path):
    """A tied student, a teacher, and two batches of which the second is text only."""
    teacher = tiny_tower(2, 32)
    student = tiny_tower(1, 16, tokenizer=teacher.tokenizer)
    student.model.config.tie_word_embeddings = student.model.config.text_config.tie_word_embeddings = True
    student.head.weight = student.model.get_input_embeddings().weight
    terms = [Term(kind, kind, Schedule(1, 1)) for kind in KINDS]
    samples = tiny_samples(folder, 3, text_only=3)
    dataset = PairDataset(samples, student, teacher, terms)
    batches = [dataset.collator([dataset[i] for i in part])["batch"] for part in ((0, 1, 2), (3, 4, 5))]
    torch.manual_seed(0)
    return student, Distiller(student, teacher, terms), batches


def step(model, optimiser, batches, counts, processes):
    for batch in batches:
        loss, _ = model(batch, counts)
        (loss * processes).backward()  # sharded gradients are means over processes
    optimiser.step()
    optimiser.zero_grad()


def shard_and_train(folder: Path) -> None:
    """What each of two processes does (see `__main__`)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    student, model, batches = distiller_of(folder / f"pictures_{rank}")  # not written by one while the other reads
    layers = tuple(model._no_split_modules)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)  # Adam would blow up the noise of vanishing gradients
    counts = torch.stack([b.counts for b in batches]).sum(0)
    for _ in range(STEPS):
        step(model, optimiser, [batches[rank]], counts, 2)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        replace_weights(model, state)
        assert not is_sharded(model)
        student.save(folder / "whole")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_sharded_processes_are_one(tmp_path):
    student, model, batches = distiller_of(tmp_path)
    assert model._no_split_modules and not is_sharded(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)  # Adam would blow up the noise of vanishing gradients
    counts = torch.stack([b.counts for b in batches]).sum(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(STEPS):
        step(model, optimiser, batches, counts, 1)
    student.save(tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "whole"))
    assert one.keys() == whole.keys() and "lm_head.weight" not in one
    for name, tensor in one.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any("vision" in name for name in moved) and any("projector" in name for name in moved)


def test_replaced_weights_keep_their_ties():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters(remove_duplicate=False)}
    replace_weights(model, state)
    assert model["a"].weight is model["b"].weight and float(model["b"].weight.sum()) == 12
    with pytest.raises(KeyError):
        replace_weights(model, {})


if __name__ == "__main__":
    shard_and_train(Path(sys.argv[1]))
    end_process(0)

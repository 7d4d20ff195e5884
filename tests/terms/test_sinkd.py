"""SinKD as a term: which rows meet, how it adds up over ranks, and what accumulation does to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objectives import (
    assert_equals,
    assert_refused_by_top_k,
    assert_refused_options,
    batch_of,
    stepped,
    term,
    towers,
)
from tiny import tiny_samples

from mmkd.terms.rows import row_keys
from mmkd.train.distiller import Distiller

HERE = Path(__file__).parent


def sinkhorn(zs, zt, temperature=2.0, epsilon=0.1, iterations=20, detach_plan=False):
    """By the definition, with products instead of logarithms. [n]"""
    q, p = (zs / temperature).softmax(-1), (zt / temperature).softmax(-1)
    cost = (q[:, None] - p[None]).abs().sum(-1)
    plan = ((cost.detach() if detach_plan else cost) / -epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum(-1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "epsilon": 0.5}, {"detach_plan": True}], ids=str)
def test_it_equals_a_plain_computation(tmp_path, options):
    assert_equals(tmp_path, term("sinkd", **options), lambda zs, zt, targets: sinkhorn(zs, zt, **options).mean())


def test_on_the_teachers_likeliest_columns(tmp_path):
    def reference(zs, zt, targets):
        columns = zt.topk(3).indices.unique()
        return sinkhorn(zs[:, columns], zt[:, columns]).mean()

    assert_equals(tmp_path, term("sinkd", columns=3), reference)


def test_more_rows_than_it_takes_are_sampled_by_their_keys(tmp_path):
    """The order of the samples in a batch changes nothing; another moment of training takes other rows."""
    student, teacher = towers()
    own, samples = term("sinkd", rows=4), tiny_samples(tmp_path, 4)
    distiller = Distiller(student, teacher, [own])
    batches = [batch_of(student, teacher, order, [own]) for order in (samples, samples[::-1])]
    found = [stepped(distiller, batch) for batch in batches]
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-10)
    whole = Distiller(student, teacher, [term("sinkd")])(batches[0])[0].item()
    assert abs(found[0][0].item() - whole) > 1e-6
    moments = {distiller(batches[0], progress=progress)[0].item() for progress in (0.0, 0.25, 0.5, 0.75)}
    assert len(moments) > 1


def test_keys_of_rows_depend_on_sample_and_place_alone():
    keys = row_keys(["a", "b"], torch.tensor([0, 0, 0, 1, 1]))
    assert len({*keys.tolist()}) == 5
    assert torch.equal(row_keys(["b"], torch.tensor([0, 0])), keys[3:])


def test_micro_batches_are_couplings_of_their_own(tmp_path):
    """Accumulation gives the mean of the parts' losses weighted by rows, not the loss of the whole: as documented."""
    student, teacher = towers()
    own, samples = term("sinkd"), tiny_samples(tmp_path, 4)
    distiller = Distiller(student, teacher, [own])
    whole = batch_of(student, teacher, samples, [own])
    parts = [batch_of(student, teacher, part, [own]) for part in (samples[:1], samples[1:])]
    total = sum(distiller(part, whole.counts)[0].item() for part in parts)
    rows = [int(part.student.response.sum()) for part in parts]
    alone = [distiller(part)[0].item() for part in parts]
    assert total == pytest.approx(sum(n * value for n, value in zip(rows, alone, strict=True)) / sum(rows), rel=1e-10)
    assert abs(total - distiller(whole)[0].item()) > 1e-6 * total


PROCESS = """
import sys
from pathlib import Path

import torch
from objectives import batch_of, stepped, term, towers
from tiny import tiny_samples

from mmkd.train.distiller import Distiller

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
samples = tiny_samples(folder / str(rank), 4)
found = {}
for rows in map(int, sys.argv[3:]):
    student, teacher = towers()
    own = term("sinkd", rows=rows)
    whole = batch_of(student, teacher, samples, [own])
    batch = batch_of(student, teacher, samples[:1] if rank == 0 else samples[1:], [own])
    loss, _, gradients = stepped(Distiller(student, teacher, [own]), batch, whole.counts)
    found[rows] = (loss, gradients)
torch.save(found, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    """One sample in one process and three in the other, all rows or a sample of them: loss and gradient add up to the whole's."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(rank), "256", "4"], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rows in (256, 4):
        student, teacher = towers()
        own = term("sinkd", rows=rows)
        whole = batch_of(student, teacher, tiny_samples(tmp_path / f"whole {rows}", 4), [own])
        loss, _, expected = stepped(Distiller(student, teacher, [own]), whole)
        assert sum(part[rows][0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-9)
        for name, gradient in expected.items():
            summed = sum(part[rows][1][name] for part in parts)
            torch.testing.assert_close(summed, gradient, rtol=1e-6, atol=1e-10, msg=name)


def test_what_it_refuses():
    assert_refused_by_top_k(term("sinkd"), "sinkd needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("sinkd", "rows is 0; it must be above 0", rows=0)
    assert_refused_options("sinkd", "epsilon is 0", epsilon=0)
    assert_refused_options("sinkd", "sinkd cannot run on the visual switch", path="switch")

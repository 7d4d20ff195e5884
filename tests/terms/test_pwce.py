"""PWCE as a term: one number couples all rows of a step, over micro-batches, ranks and chunks."""

import pytest
import torch
from objectives import TOKENIZER, assert_equals, assert_micro_batches_add_up, assert_refused_options, batch_of, term, towers
from tiny import tiny_samples, tiny_tower
from torch.nn import functional as F

from mmkd.terms.term import Place, Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.spec import StageSpec
from mmkd.train.trainer import DistillTrainer, training_arguments


def reference(a, lam):
    def mean(zs, zt, targets):
        ce = F.cross_entropy(zs, targets, reduction="none")
        perplexity = ce.detach().exp()
        share = 1 + a * perplexity / (perplexity.mean() + 1e-6)
        return (ce * (1 + lam * share / share.mean())).mean()

    return mean


@pytest.mark.parametrize(("a", "lam"), [(1.0, 1.0), (3.0, 0.5), (0.0, 1.0)])
def test_it_equals_a_plain_computation(tmp_path, a, lam):
    assert_equals(tmp_path, term("pwce", a=a, lam=lam), reference(a, lam))


def test_micro_batches_add_up_with_the_sums_of_the_step(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("pwce", a=2.0), step_sums=True)


def test_it_needs_no_teacher_and_only_its_own_rows_count(tmp_path):
    """Beside a term on other positions; the rows of all prompts are others than those of the answers."""
    student, _ = towers()
    samples = tiny_samples(tmp_path, 3)
    own, other = term("pwce"), term("cross_entropy", 0.5, positions="prompt")
    alone, _ = Distiller(student, None, [own])(batch_of(student, None, samples, [own]))
    _, log = Distiller(student, None, [own, other])(batch_of(student, None, samples, [own, other]))
    total, count = log["pwce"]
    assert float(total / count) == pytest.approx(alone.item(), rel=1e-10)


def test_sums_over_samples_have_the_same_weights(tmp_path):
    """reduction: sum divides by samples; the mean perplexity is still one over rows."""
    student, _ = towers()
    samples = tiny_samples(tmp_path, 3)
    own = term("pwce")
    summed = type(own)(place=Place("pwce", "pwce", Schedule(1.0, 1.0), reduction="sum"))
    batch = batch_of(student, None, samples, [own])
    mean, total = (Distiller(student, None, [one])(batch)[0] for one in (own, summed))
    rows = int(batch.student.response.sum())
    assert total.item() == pytest.approx(mean.item() * rows / len(samples), rel=1e-10)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_in_micro_batches_ends_with_the_same_weights(tmp_path, ahead):
    """Also beside a teacher whose pass over the next micro-batch begins early."""
    samples, found = tiny_samples(tmp_path / "data", 8), []
    for micro in (4, 2):
        student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
        own = [term("pwce", a=5.0), term("forward_kl", 0.1)]
        spec = StageSpec.model_validate({
            "data": [{"format": "jsonl", "root": "r"}], "terms": {"pwce": 1.0}, "steps": 3, "log_every": 1,
            "optimiser": {"batch_size": 4, "micro_batch_size": micro, "learning_rate": 1e-3},
        })  # fmt: skip
        folder = tmp_path / f"{micro}"
        trainer = DistillTrainer(
            Distiller(student, teacher, own), PairDataset(samples, student, teacher, own), spec,
            training_arguments(spec, "one", folder, 3, 1), folder / "log.jsonl", ahead=ahead,
        )  # fmt: skip
        trainer.train()
        found.append({name: p.detach() for name, p in student.model.named_parameters()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def test_what_it_refuses():
    assert_refused_options("pwce", "none may be negative", a=-1.0)
    assert_refused_options("pwce", "pwce has no target at positions: visual", positions="visual")
    assert_refused_options("pwce", "pwce cannot run on the visual switch", path="switch")

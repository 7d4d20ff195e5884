"""What the tests of objectives share: a distiller on tiny float64 towers beside whole logits, cuts into micro-batches, caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import make_term, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.errors import TowerError
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.teacher import Gives
from mmkd.terms.term import Schedule
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller

TOKENIZER = tiny_tokenizer()
BAR = 2e-6


def term(kind, weight=1.0, **options):
    return make_term(kind, kind, Schedule(weight, weight), options.pop("positions", "response"), options=tuple(options.items()))


def towers(dtype=torch.float64):
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    for tower in (student, teacher):
        tower.model.to(dtype)
    return student, teacher


def batch_of(student, teacher, samples, terms):
    dataset = PairDataset(samples, student, teacher, terms)
    return Collator(student, teacher)([dataset[i] for i in range(len(samples))])["batch"]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def logits(tower, inputs, where):
    """Whole logits the ordinary way, of the rows `where`, [R, V]."""
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels)
    return out.logits[where].double()


def stepped(distiller, batch, counts=None):
    """(loss, log, gradients) of one pass forth and back."""
    distiller.zero_grad()
    loss, log = distiller(batch, counts)
    loss.backward()
    return loss.detach(), log, gradients(distiller)


def assert_equals(folder, own, reference, *, rtol=1e-6, chunk_bytes=2**16):
    """Value and gradient of a term against `reference(student logits, teacher logits, targets) -> mean` on whole logits."""
    student, teacher = towers()
    samples = tiny_samples(folder, 3, text_only=1)
    distiller = Distiller(student, teacher, [own], chunk_bytes=chunk_bytes)
    batch = batch_of(student, teacher, samples, [own])
    loss, log, ours = stepped(distiller, batch)
    inputs = batch.student
    student.model.zero_grad()
    zt = logits(teacher, inputs, inputs.response).detach()
    expected = reference(logits(student, inputs, inputs.response), zt, inputs.targets[inputs.response])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=BAR)
    total, count = log[own.name]
    assert (total / count).item() == pytest.approx(expected.item(), rel=BAR)
    theirs = gradients(student.model)
    assert any(g.abs().max() > 1e-6 for g in theirs.values())
    assert {f"student.{name}" for name in theirs} <= ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=rtol, atol=1e-9, msg=name)


def assert_micro_batches_add_up(folder, own, parts=((0,), (1, 3), (2, 4)), step_sums=False):
    """One batch of five samples against the same in parts, loss and gradients."""
    student, teacher = towers()
    samples = tiny_samples(folder, 3, text_only=1, two_images=1)
    distiller = Distiller(student, teacher, [own], chunk_bytes=2**16)
    whole = batch_of(student, teacher, samples, [own])
    loss, _, expected = stepped(distiller, whole)
    pieces = [batch_of(student, teacher, [samples[i] for i in part], [own]) for part in parts]
    if step_sums:
        found = [distiller(piece, step_sums=True)[own.name] for piece in pieces]
        pieces = [replace(piece, step_sums={own.name: sum(found)}) for piece in pieces]
    total, summed = 0.0, {}
    for piece in pieces:
        value, _, grads = stepped(distiller, piece, whole.counts)
        total += value.item()
        summed = {name: summed.get(name, 0) + grads.get(name, 0) for name in {*summed, *grads}}
    assert total == pytest.approx(loss.item(), rel=1e-9)
    assert summed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


class TopK(LiveTeacher):
    """A teacher that says it keeps the k likeliest tokens of response rows."""

    @property
    def gives(self):
        return Gives("the cache", frozenset({"rows", "switch"}), frozenset({"response"}), 8, "top-8")


def assert_refused_by_top_k(own, why):
    student, teacher = towers(torch.float32)
    with pytest.raises(TowerError, match=why):
        Distiller(student, TopK(teacher), [own])


def assert_refused_options(kind, message, **options):
    """From the recipe alone."""
    from mmkd.terms.spec import TermSpec

    with pytest.raises(ValueError, match=message):
        TermSpec(kind=kind, **options)

"""FIRST as a term: against a live teacher, and against a cache of its likeliest tokens."""

from dataclasses import dataclass

import pytest
import torch
from objectives import (
    BAR,
    TopK,
    assert_equals,
    assert_micro_batches_add_up,
    assert_refused_options,
    batch_of,
    logits,
    term,
    towers,
)
from tiny import tiny_samples

from mmkd.errors import TowerError
from mmkd.teachers.teacher import TeacherSignals
from mmkd.train.distiller import Distiller


def reference(c=1.0, k=5, normalise="softmax", other=False):
    def mean(zs, zt, targets):
        ids = zt.topk(k).indices
        p, q = zt.softmax(-1).gather(-1, ids), zs.softmax(-1).gather(-1, ids)
        if other:
            p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        if normalise == "linear":
            t, s = ((x + 1e-6) / (x + 1e-6).sum(-1, keepdim=True) for x in (p, q))
        else:
            t, s = (p / c).softmax(-1), q.softmax(-1)
        return (t * (t / s).log()).sum(-1).mean()

    return mean


@pytest.mark.parametrize("options", [{}, {"c": 0.2, "k": 7}, {"normalise": "linear"}, {"other": True}], ids=str)
def test_it_equals_a_plain_computation(tmp_path, options):
    assert_equals(tmp_path, term("first", **options), reference(**options))


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("first"))


@dataclass
class Kept(TeacherSignals):
    """The eight likeliest tokens of all response rows, as a cache keeps them but in float64."""

    teacher: object
    inputs: object

    def rows(self, positions, samples=None):
        with torch.no_grad():
            log_probs, ids = logits(self.teacher, self.inputs, self.inputs.response).log_softmax(-1).topk(8)
        return {"ids": ids.int(), "log_probs": log_probs, "tail": (1 - log_probs.exp().sum(-1)).log()}

    def visual_rows(self):
        raise AssertionError

    def features(self):
        raise AssertionError


class Cache(TopK):
    def say(self, inputs, host, *, shared=None, differentiable=False):
        return Kept(self.tower, inputs)


def test_a_top_k_cache_gives_what_the_live_teacher_gives(tmp_path):
    student, teacher = towers()
    own, samples = term("first", c=0.5), tiny_samples(tmp_path, 3)
    found = []
    for one in (teacher, Cache(teacher)):
        distiller = Distiller(student, one, [own])
        student.model.zero_grad()
        loss, _ = distiller(batch_of(student, one, samples, [own]))
        loss.backward()
        found.append((loss.detach(), student.head.weight.grad.clone()))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=BAR)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-10)


def test_what_it_refuses():
    student, teacher = towers(torch.float32)
    with pytest.raises(TowerError, match="first: first reads the 9 likeliest tokens, the cache has top-8"):
        Distiller(student, TopK(teacher), [term("first", k=9)])
    Distiller(student, TopK(teacher), [term("first", k=8)])
    with pytest.raises(TowerError, match="first: needs prompt rows, the cache has response"):
        Distiller(student, TopK(teacher), [term("first", positions="prompt")])
    assert_refused_options("first", "k is 1; it must be at least 2", k=1)
    assert_refused_options("first", "normalise is 'sum'", normalise="sum")

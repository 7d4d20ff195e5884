"""Swing as a term: which tokens count as private, their temperature, and noise that stays with its token."""

from dataclasses import replace

import pytest
import torch
from objectives import (
    TOKENIZER,
    assert_equals,
    assert_micro_batches_add_up,
    assert_refused_by_top_k,
    assert_refused_options,
    batch_of,
    logits,
    term,
    towers,
)
from tiny import tiny_samples

from mmkd.data.samples import Turn
from mmkd.losses.swing import gaussian
from mmkd.terms.rows import row_keys
from mmkd.terms.swing import Swing
from mmkd.terms.term import Place, Schedule
from mmkd.train.distiller import Distiller


class Letters(Swing):
    """The answers of `tiny_samples` have no digits: here it is capital letters and the "e" that are private."""

    def scores(self, tower):
        texts = [tower.tokenizer.decode([i]) for i in range(len(tower.tokenizer))]
        return torch.tensor([0.75 if text.strip() in "ABC" and text.strip() else 0.25 * ("e" in text) for text in texts])


def letters(**options):
    return Letters(**options, place=Place("swing", "swing", Schedule(1.0, 1.0)))


def reference(tau_min, tau_max, low=0.25, high=0.75):
    def mean(zs, zt, targets):
        texts = [TOKENIZER.decode([i]) for i in targets.tolist()]
        scores = [high if text.strip() in "ABC" and text.strip() else low * ("e" in text) for text in texts]
        assert len({*scores}) > 1
        rows = []
        for s, t, score in zip(zs, zt, scores, strict=True):
            tau = tau_min + (tau_max - tau_min) * score
            p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
            rows.append(tau**2 * (p * (p / q).log()).sum())
        return torch.stack(rows).mean()

    return mean


@pytest.mark.parametrize(("tau_min", "tau_max"), [(1.0, 4.0), (0.5, 2.0)])
def test_it_equals_a_plain_computation(tmp_path, tau_min, tau_max):
    assert_equals(tmp_path, letters(tau_min=tau_min, tau_max=tau_max), reference(tau_min, tau_max))


def test_without_private_tokens_it_is_the_forward_kl(tmp_path):
    def forward_kl(zs, zt, targets):
        return (zt.softmax(-1) * (zt.log_softmax(-1) - zs.log_softmax(-1))).sum(-1).mean()

    assert_equals(tmp_path, term("swing"), forward_kl)


def test_digits_are_private():
    student, _ = towers()
    scores = term("swing").scores(student)
    of = {text: scores[student.tokenizer.convert_tokens_to_ids(text)].item() for text in ("7", "a", "<|end|>")}
    assert of == {"7": 1.0, "a": 0.0, "<|end|>": 0.0} and len(scores) == len(TOKENIZER)


def test_noise_stays_with_its_token(tmp_path):
    """Not with its batch: micro-batches and other terms' rows change nothing, other samples' noise is another."""
    assert_micro_batches_add_up(tmp_path / "a", letters(noise=2.0))
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3)
    own, other = letters(noise=2.0), term("forward_kl", 0.5, positions="visual")
    found = []
    for terms in ([own], [own, other]):
        _, log = Distiller(student, teacher, terms)(batch_of(student, teacher, samples, terms))
        found.append(log["swing"][0].item())
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    quiet = Distiller(student, teacher, [letters()])(batch_of(student, teacher, samples, [own]))[1]["swing"][0].item()
    assert abs(found[0] - quiet) > 1e-3 * quiet


def test_noise_is_that_of_the_keys_of_the_rows(tmp_path):
    student, teacher = towers()
    samples = [replace(s, turns=(*s.turns[:-1], Turn("assistant", "red A B C"))) for s in tiny_samples(tmp_path, 2)]
    own = letters(noise=2.0)
    distiller, batch = Distiller(student, teacher, [own]), batch_of(student, teacher, samples, [own])
    value, _ = distiller(batch)
    inputs = batch.student
    keys = row_keys(inputs.ids, inputs.response.nonzero()[:, 0])
    assert len({*keys.tolist()}) == len(keys)
    zs, zt = (logits(tower, inputs, inputs.response) for tower in (student, teacher))
    noise = torch.stack([gaussian(key[None], zs.shape[1])[0] for key in keys]).double()
    scores = own.scores(student)[inputs.targets[inputs.response]].double()[:, None]
    tau = 1 + 3 * scores
    p, q = ((zt + 2.0 * scores * noise) / tau).softmax(-1), (zs / tau).softmax(-1)
    assert value.item() == pytest.approx((tau[:, 0] ** 2 * (p * (p / q).log()).sum(-1)).mean().item(), rel=2e-6)


def test_what_it_refuses():
    assert_refused_by_top_k(term("swing"), "swing needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("swing", "tau_min is 3.0 and tau_max 2.0", tau_min=3.0, tau_max=2.0)
    assert_refused_options("swing", "swing has no target at positions: visual", positions="visual")

"""DAC-KL as a term: with a fixed band, and with one that is trained beside the student."""

from __future__ import annotations

import pytest
import torch
from objectives import (
    assert_equals,
    assert_micro_batches_add_up,
    assert_refused_by_top_k,
    assert_refused_options,
    batch_of,
    logits,
    stepped,
    term,
    towers,
)
from safetensors.torch import load_model, save_model
from tiny import tiny_samples

from mmkd.losses import DACKL
from mmkd.train.distiller import Distiller


def plain(zs, zt, low, high, softness):
    """By the definition, with a sort of each row; low, high: [R]."""
    q, p = zs.softmax(-1), zt.softmax(-1)
    ordered, ids = p.sort(dim=-1, stable=True)
    place = torch.empty_like(p).scatter(-1, ids, ordered.cumsum(-1) - ordered / 2)
    beyond = torch.maximum(low[:, None] - place, place - high[:, None]).clamp(min=0)
    inside = (1 - beyond / softness).clamp(min=0) if softness else (beyond == 0).double()
    rest_p, rest_q = ((1 - inside) * p).sum(-1), ((1 - inside) * q).sum(-1)
    rest = rest_p * (rest_p.clamp(min=1e-300) / rest_q.clamp(min=1e-300)).log()
    return (inside * p * (p / q).log()).sum(-1) + rest


@pytest.mark.parametrize(("low", "high", "softness"), [(0.3, 0.9, 0.1), (0.5, 1.0, 0.0), (0.0, 1.0, 0.1)])
def test_a_fixed_band_equals_a_plain_computation(tmp_path, low, high, softness):
    def reference(zs, zt, targets):
        ends = (torch.full_like(zs[:, 0], end, dtype=torch.float32).double() for end in (low, high))
        return plain(zs, zt, *ends, softness).mean()

    own = term("dac_kl", band="fixed", low=low, high=high, softness=softness)
    assert own.extra(None) is None
    assert_equals(tmp_path, own, reference)


def test_a_fixed_band_of_everything_is_the_forward_kl(tmp_path):
    def forward_kl(zs, zt, targets):
        return (zt.softmax(-1) * (zt.log_softmax(-1) - zs.log_softmax(-1))).sum(-1).mean()

    assert_equals(tmp_path, term("dac_kl", band="fixed"), forward_kl)


def learned(folder, **options):
    """A distiller whose band has moved from its start, and a batch."""
    student, teacher = towers()
    own = term("dac_kl", softness=0.3, least=0.2, inputs=8, **options)
    distiller = Distiller(student, teacher, [own])
    torch.manual_seed(0)
    for p in distiller.extras.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return distiller, batch_of(student, teacher, tiny_samples(folder, 4), [own])


def test_a_learned_band_equals_a_plain_computation(tmp_path):
    """Value and the gradients to the student and, through the ends, to the band."""
    distiller, batch = learned(tmp_path)
    loss, _, ours = stepped(distiller, batch)
    distiller.zero_grad()
    inputs, student, teacher = batch.student, distiller.tower, distiller.teachers["teacher"].tower
    zs, zt = (logits(tower, inputs, inputs.response) for tower in (student, teacher))
    low, high = distiller.extras["dac_kl"](zt.log_softmax(-1).topk(8).values.float().detach())
    assert low.std() > 1e-3 and (high - low).min() >= 0.2
    expected = plain(zs, zt.detach(), low.double(), high.double(), 0.3).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert distiller.extras["dac_kl"].layers[2].weight.grad.abs().max() > 1e-5
    for name, p in distiller.named_parameters():
        if p.grad is not None:
            band = name.startswith("extras")
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-3 if band else 1e-5, atol=1e-6 if band else 1e-8, msg=name)


def test_a_sample_of_rows_trains_the_band_and_leaves_value_and_student_alone(tmp_path):
    found = []
    for sample in (256, 3):
        distiller, batch = learned(tmp_path, sample=sample)
        found.append(stepped(distiller, batch))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-10)
    name = "extras.dac_kl.layers.2.weight"
    assert not torch.allclose(found[0][2][name], found[1][2][name], rtol=1e-2)
    for name, gradient in found[0][2].items():
        if name.startswith("student"):
            torch.testing.assert_close(found[1][2][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_narrows_the_band(tmp_path):
    distiller, batch = learned(tmp_path)
    optimiser = torch.optim.SGD(distiller.extras.parameters(), lr=1e-3)
    before, _, _ = stepped(distiller, batch)
    optimiser.step()
    assert stepped(distiller, batch)[0] < before


@pytest.mark.parametrize("band", ["fixed", "learned"])
def test_micro_batches_add_up(tmp_path, band):
    """With a learned band too, where no micro-batch has more rows than the sample."""
    own = term("dac_kl", band=band, low=0.2, high=0.9)
    if band == "fixed":
        return assert_micro_batches_add_up(tmp_path, own)
    distiller, whole = learned(tmp_path)
    loss, _, expected = stepped(distiller, whole)
    samples = tiny_samples(tmp_path, 4)
    total, summed = 0.0, {}
    for part in ([0], [1, 3], [2]):
        piece = batch_of(distiller.tower, distiller.teachers, [samples[i] for i in part], distiller.terms)
        value, _, grads = stepped(distiller, piece, whole.counts)
        total += value.item()
        summed = {name: summed.get(name, 0) + grads[name] for name in grads}
    # The band's ends are float32, and products of other numbers of rows round otherwise.
    assert total == pytest.approx(loss.item(), rel=1e-8)
    for name, gradient in expected.items():
        rtol, atol = (1e-4, 1e-6) if name.startswith("extras") else (1e-6, 2e-7 * float(gradient.abs().max()) + 1e-15)
        torch.testing.assert_close(summed[name], gradient, rtol=rtol, atol=atol, msg=name)


def test_the_band_is_in_checkpoints(tmp_path):
    distiller, batch = learned(tmp_path)
    value, _ = distiller(batch)
    save_model(distiller, str(tmp_path / "w.safetensors"))
    again, _ = learned(tmp_path)
    torch.nn.init.zeros_(again.extras["dac_kl"].layers[2].weight)
    assert again(batch)[0].item() != value.item()
    load_model(again, str(tmp_path / "w.safetensors"))
    assert again(batch)[0].item() == value.item()


def test_what_it_refuses():
    assert_refused_by_top_k(term("dac_kl"), "dac_kl needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("dac_kl", "low is 0.5 and high 0.2; they must be 0 <= low <= high <= 1", low=0.5, high=0.2)
    assert_refused_options("dac_kl", "a learned band needs softness", softness=0.0)
    assert_refused_options("dac_kl", "least is 2.0", least=2.0)
    assert_refused_options("dac_kl", "dac_kl cannot run on the visual switch", path="switch")
    assert DACKL(0.0)  # a fixed band may end at once

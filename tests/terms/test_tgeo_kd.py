"""TGeo-KD in float64: loss, what the network reads, and its gradient against a step of the student that is taken."""

import pytest
import torch
from objectives import batch_of, gradients, logits, stepped, term, towers
from pydantic import ValidationError
from tiny import make_term, tiny_samples
from torch.nn.functional import one_hot

from mmkd.terms.spec import TermSpec
from mmkd.terms.term import Schedule
from mmkd.terms.tgeo_kd import agreement, class_means, triangle
from mmkd.train.distiller import Distiller


def made(folder, chunk_bytes=2**20, **options):
    """A distiller in float64 whose network is no constant, and a batch of four samples."""
    student, teacher = towers()
    own = term("tgeo_kd", **options)
    torch.manual_seed(0)
    distiller = Distiller(student, teacher, [own], chunk_bytes=chunk_bytes)
    network = distiller.extras["tgeo_kd"].double()
    torch.nn.init.normal_(network[-1].weight, std=0.5)
    return distiller, batch_of(student, teacher, tiny_samples(folder, 3, text_only=1), [own]), student, teacher, network


def read_by_network(q, p, y):
    """The nine numbers of each row, written out."""
    label = one_hot(y, q.shape[-1]).double()
    three = torch.stack([(p - q).norm(dim=-1), (p - label).norm(dim=-1), (q - label).norm(dim=-1)], -1)
    means = torch.stack([three[y == target].mean(0) for target in y])
    costs = [-x[torch.arange(len(y)), y].log() for x in (q, p)]
    return torch.cat([three, torch.stack([*costs, (p * (p / q).log()).sum(-1)], -1), means], -1).log1p()


@pytest.mark.parametrize("chunk_bytes", [2**20, 2**16])
def test_value_and_the_students_gradient_are_those_of_the_loss_with_its_ratio_held(tmp_path, chunk_bytes):
    distiller, batch, student, teacher, network = made(tmp_path, chunk_bytes)
    loss, log, ours = stepped(distiller, batch)
    inputs = batch.student
    student.model.zero_grad()
    zq, y = logits(student, inputs, inputs.response), inputs.targets[inputs.response]
    p = logits(teacher, inputs, inputs.response).detach().softmax(-1)
    ratio = network(read_by_network(zq.detach().softmax(-1), p, y)).sigmoid()[:, 0].detach()
    assert ratio.std() > 0.005 and ((ratio > 0) & (ratio < 1)).all()
    q = zq.log_softmax(-1)
    kl, nll = (p * (p.log() - q)).sum(-1), -q.gather(-1, y[:, None])[:, 0]
    expected = (ratio * kl + (1 - ratio) * nll).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for name, gradient in gradients(student.model).items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=1e-5, atol=1e-9, msg=name)
    total, count = log["tgeo_kd.ratio"]
    assert (total / count).item() == pytest.approx(ratio.mean().item(), rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [2**20, 2**16])
def test_the_networks_gradient_is_that_of_the_other_halfs_labels_after_a_step_of_the_head(tmp_path, chunk_bytes):
    """The step is taken with autograd, at a rate so small that its square does not count."""
    rate = 1e-6
    distiller, batch, student, teacher, network = made(tmp_path, chunk_bytes)
    _, _, ours = stepped(distiller, batch)
    inputs = batch.student
    with torch.no_grad():
        hidden = student.read(inputs, student.see(inputs))[inputs.response].double()
        p = logits(teacher, inputs, inputs.response).softmax(-1)
    y, place = inputs.targets[inputs.response], inputs.response.nonzero()[:, 0]
    length = hidden.square().sum(-1).mean()
    head = student.model.get_output_embeddings().weight.detach().double()[: p.shape[-1]].requires_grad_()
    ratio = network(read_by_network((hidden @ head.T).softmax(-1).detach(), p, y)).sigmoid()[:, 0]
    after = 0.0
    for half in (0, 1):
        own, other = place % 2 == half, place % 2 != half
        q = (hidden[own] @ head.T).log_softmax(-1)
        kl = (p[own] * (p[own].log() - q)).sum(-1)
        nll = -q.gather(-1, y[own][:, None])[:, 0]
        (slope,) = torch.autograd.grad((ratio[own] * kl + (1 - ratio[own]) * nll).sum(), head, create_graph=True)
        moved = head - rate / length * slope
        judged = (hidden[other] @ moved.T).log_softmax(-1)
        after = after - judged.gather(-1, y[other][:, None])[:, 0].mean()
    found = torch.autograd.grad(after, list(network.parameters()))
    for (name, _), gradient in zip(network.named_parameters(), found, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[f"extras.tgeo_kd.{name}"], gradient / rate / len(y), rtol=2e-4, atol=1e-8, msg=name)


def test_without_an_inner_step_the_network_learns_nothing(tmp_path):
    distiller, batch, *_ = made(tmp_path, look_ahead=0)
    _, _, ours = stepped(distiller, batch)
    assert all(g.abs().max() == 0 for name, g in ours.items() if name.startswith("extras."))


def test_a_constant_network_is_distillation_at_a_fixed_ratio(tmp_path):
    student, teacher = towers()
    samples = tiny_samples(tmp_path, 3, text_only=1)
    own = term("tgeo_kd")
    both = [make_term("kl", "forward_kl", Schedule(0.5, 0.5)), make_term("ce", "cross_entropy", Schedule(0.5, 0.5))]
    loss, _, ours = stepped(Distiller(student, teacher, [own]), batch_of(student, teacher, samples, [own]))
    fixed, _, theirs = stepped(Distiller(student, teacher, both), batch_of(student, teacher, samples, both))
    assert loss.item() == pytest.approx(fixed.item(), rel=1e-7)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-10, msg=name)


def test_a_teacher_that_is_the_label_collapses_the_triangle_and_makes_no_ratio_better():
    y = torch.tensor([1, 3, 0])
    p, q = one_hot(y, 5).double(), torch.randn(3, 5, dtype=torch.float64).softmax(-1)
    found = triangle(q, p, y)
    assert found[:, 1].abs().max() == 0 and found[:, 4].abs().max() == 0
    torch.testing.assert_close(found[:, 0], found[:, 2])
    torch.testing.assert_close(found[:, 3], found[:, 5])  # cross-entropy is the divergence, so the ratio changes no loss
    assert agreement(p, y, q, y).abs().max() < 1e-15
    for side in (0, 1, 2):
        longest = found[:, side] <= found[:, [n for n in range(3) if n != side]].sum(-1) + 1e-12
        assert longest.all()


def test_class_means_and_products():
    values, y = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([4, 7, 4])
    assert class_means(values, y).tolist() == [[3.5], [2.0], [3.5]]
    p, q = (torch.randn(n, 9, dtype=torch.float64).softmax(-1) for n in (3, 2))
    own, judged = torch.tensor([1, 8, 2]), torch.tensor([8, 0])
    written_out = (one_hot(own, 9) - p) @ (q - one_hot(judged, 9)).T
    torch.testing.assert_close(agreement(p, own, q, judged), written_out)


def test_a_micro_batch_of_one_sample_has_no_other_half(tmp_path):
    student, teacher = towers()
    own = term("tgeo_kd")
    loss, _, ours = stepped(Distiller(student, teacher, [own]), batch_of(student, teacher, tiny_samples(tmp_path, 1), [own]))
    assert loss > 0 and all(g.abs().max() == 0 for name, g in ours.items() if name.startswith("extras."))


@pytest.mark.parametrize(("given", "words"), [({"look_ahead": -1}, "not be negative"), ({"positions": "visual"}, "no label")])
def test_what_makes_no_sense_is_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        TermSpec(kind="tgeo_kd", **given)

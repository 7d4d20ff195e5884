"""Terms that learn from several teachers: each against whole logits in float64."""

from dataclasses import replace

import pytest
import torch
from objectives import TOKENIZER, batch_of, gradients, logits, stepped, term
from pydantic import ValidationError
from tiny import make_term, tiny_samples, tiny_tower

from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.teachers.live import LiveTeacher
from mmkd.terms.confident_teachers import confidence
from mmkd.terms.gated_teachers import imbalance, kept
from mmkd.terms.residual_match import branches, residual_of
from mmkd.terms.spec import TermSpec
from mmkd.terms.term import Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.skips import Skip

NAMES = ("a", "b")


def tower(seed, width):
    made = tiny_tower(seed, width, tokenizer=TOKENIZER)
    made.model.double()
    return made


@pytest.fixture
def pair():
    """A student and two teachers in float64."""
    return tower(1, 16), {name: LiveTeacher(tower(seed, 32), name) for name, seed in zip(NAMES, (2, 5), strict=True)}


def reference(student, teachers, batch):
    """Targets, log q and both log p on whole logits, [R, V] each, log q with gradient."""
    inputs = batch.student
    q = logits(student, inputs, inputs.response).log_softmax(-1)
    p = [logits(teachers[name].tower, inputs, inputs.response).detach().log_softmax(-1) for name in NAMES]
    return inputs.targets[inputs.response], q, p


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def assert_is(distiller, batch, student, loss_of):
    """Value and the student's gradient against `loss_of()`."""
    loss, log, ours = stepped(distiller, batch)
    student.model.zero_grad()
    expected = loss_of()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for name, gradient in gradients(student.model).items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=1e-5, atol=1e-9, msg=name)
    return log, ours


def made(student, teachers, own, samples):
    return Distiller(student, teachers, [own], chunk_bytes=2**16), batch_of(student, teachers, samples, [own])


def test_fixed_weights_are_the_weighted_mean_of_the_divergences_and_the_kl_to_the_mean_of_the_teachers(tmp_path, pair):
    student, teachers = pair
    own = term("mixed_teachers", teachers={"a": 3, "b": 1})
    distiller, batch = made(student, teachers, own, tiny_samples(tmp_path, 3, text_only=1))

    def expected():
        _, q, (a, b) = reference(student, teachers, batch)
        return (0.75 * kl(a, q) + 0.25 * kl(b, q)).mean()

    log, ours = assert_is(distiller, batch, student, expected)
    assert (log["mixed_teachers.a.weight"][0] / log["mixed_teachers.a.weight"][1]).item() == pytest.approx(0.75)
    student.model.zero_grad()
    _, q, (a, b) = reference(student, teachers, batch)
    kl((0.75 * a.exp() + 0.25 * b.exp()).log(), q).mean().backward()
    for name, gradient in gradients(student.model).items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=1e-5, atol=1e-9, msg=name)


def test_all_weight_on_one_teacher_is_that_teacher_alone_and_micro_batches_add_up(tmp_path, pair):
    student, teachers = pair
    samples = tiny_samples(tmp_path, 3, text_only=1)
    own, alone = term("mixed_teachers", teachers={"a": 1, "b": 0}), make_term("kl", "forward_kl", Schedule(1, 1), teacher="a")
    distiller, whole = made(student, teachers, own, samples)
    loss, _, ours = stepped(distiller, whole)
    other, batch = made(student, {"a": teachers["a"]}, alone, samples)
    expected, _, theirs = stepped(other, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9)
    parts = [stepped(distiller, batch_of(student, teachers, part, [own]), whole.counts) for part in (samples[:1], samples[1:])]
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-6)


def test_a_micro_batch_without_rows_gives_nothing_and_logs_the_same_names(tmp_path, pair):
    student, teachers = pair
    own = make_term("mix", "gated_teachers", Schedule(1, 1), "generated", options=(("teachers", ["a", "b"]),))
    samples = tiny_samples(tmp_path, 2)
    distiller = Distiller(student, teachers, [own])
    loss, log, ours = stepped(distiller, batch_of(student, teachers, samples, [own]))
    assert loss.item() == 0 and all(g.abs().max() == 0 for g in ours.values())
    assert {name for name, _ in distiller.extras.named_parameters()} <= {name.removeprefix("extras.") for name in ours}
    _, full, _ = stepped(distiller, own_answers(student, teachers, own, samples))
    assert log.keys() == full.keys()


@pytest.mark.parametrize("by", ["answer", "entropy"])
def test_the_surer_teacher_weighs_more(tmp_path, pair, by):
    student, teachers = pair
    own = term("confident_teachers", teachers=["a", "b"], by=by)
    distiller, batch = made(student, teachers, own, tiny_samples(tmp_path, 3, text_only=1))

    def expected():
        targets, q, p = reference(student, teachers, batch)
        cost = [-x.gather(-1, targets[:, None])[:, 0] if by == "answer" else -(x.exp() * x).sum(-1) for x in p]
        share = cost[0].exp() / (cost[0].exp() + cost[1].exp())
        return ((1 - share) * kl(p[0], q) + share * kl(p[1], q)).mean()

    assert_is(distiller, batch, student, expected)


def test_confidence_adds_up_and_is_equal_for_equal_teachers():
    cost = torch.tensor([[1.0, 2.0], [1.0, 0.5], [1.0, 9.0]])
    torch.testing.assert_close(confidence(cost).sum(0), torch.ones(2))
    torch.testing.assert_close(confidence(cost)[:, 0], torch.full((3,), 1 / 3))
    assert confidence(cost)[:, 1].argmax() == 1 and confidence(cost)[:, 1].argmin() == 2


def tagged(samples, tags):
    return [replace(sample, meta={"tag": tag}) for sample, tag in zip(samples, tags, strict=True)]


def test_each_sample_learns_from_its_own_teacher(tmp_path, pair):
    student, teachers = pair
    own = term("routed_teachers", teachers={"a": ["charts"], "b": ["photos", "drawings"]})
    samples = tagged(tiny_samples(tmp_path, 3, text_only=1), ["charts", "drawings", "photos", "charts"])
    distiller, batch = made(student, teachers, own, samples)

    def expected():
        _, q, (a, b) = reference(student, teachers, batch)
        first = torch.tensor([True, False, False, True])[batch.student.response.nonzero()[:, 0]]
        return torch.where(first, kl(a, q), kl(b, q)).mean()

    log, _ = assert_is(distiller, batch, student, expected)
    assert log["routed_teachers.a.weight"][0] == int(batch.student.response[[0, 3]].sum())


def test_a_sample_without_a_teacher_is_left_out_or_goes_to_the_other_one(tmp_path, pair):
    student, teachers = pair
    samples = tagged(tiny_samples(tmp_path, 2), ["charts", "maps"])
    own = term("routed_teachers", teachers={"a": ["charts"], "b": ["photos"]})
    found = PairDataset(samples, student, teachers, [own], max_skipped=1)[1]
    assert isinstance(found, Skip) and "its tag is 'maps'" in found.message
    own = term("routed_teachers", teachers={"a": ["charts"]}, otherwise="b")
    assert PairDataset(samples, student, teachers, [own])[1].facts == {"routed_teachers": "b"}


def test_the_gate_gets_the_gradient_of_the_losses_that_it_weighs_and_of_its_balance(tmp_path, pair):
    student, teachers = pair
    own = term("gated_teachers", teachers=["a", "b"], balance=0.3)
    distiller, batch = made(student, teachers, own, tiny_samples(tmp_path, 3, text_only=1))
    gate = distiller.extras["gated_teachers"].double()
    torch.manual_seed(0)
    torch.nn.init.normal_(gate[-1].weight)
    found = {}

    def expected():
        gate.zero_grad()
        _, q, p = reference(student, teachers, batch)
        inputs = batch.student
        out = student.read(inputs, student.see(inputs)).detach()
        means = torch.stack([hidden[where].mean(0) for hidden, where in zip(out, inputs.response, strict=True)])
        weights = gate(means).softmax(-1)
        each = torch.stack([kl(x, q) for x in p], -1)
        at = inputs.response.nonzero()[:, 0]
        mean = weights.mean(0)
        value = (weights[at] * each).sum(-1).mean() + 0.3 * (mean * (2 * mean).log()).sum()
        found["value"] = value
        return value

    _, ours = assert_is(distiller, batch, student, expected)
    for name, parameter in gate.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(ours[f"extras.gated_teachers.{name}"], parameter.grad, rtol=1e-4, atol=1e-8, msg=name)


def test_a_uniform_gate_is_balanced_and_the_order_of_teachers_changes_only_its_order():
    gate = torch.rand(5, 4).softmax(-1)
    assert imbalance(torch.full((5, 4), 0.25)).item() == pytest.approx(0, abs=1e-7)
    assert imbalance(gate) > 0
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(kept(gate[:, order], 2), kept(gate, 2)[:, order])
    torch.testing.assert_close(kept(gate, 2).sum(-1), torch.ones(5))
    assert ((kept(gate, 2) > 0).sum(-1) == 2).all()
    torch.testing.assert_close(kept(gate, 4), gate / gate.sum(-1, keepdim=True))


def test_a_gate_over_equal_teachers_is_distillation_from_one(tmp_path, pair):
    student, teachers = pair
    same = {"a": teachers["a"], "b": LiveTeacher(tower(2, 32), "b")}
    own = term("gated_teachers", teachers=["a", "b"], top_k=1, balance=0)
    distiller, batch = made(student, same, own, tiny_samples(tmp_path, 3))
    assert_is(distiller, batch, student, lambda: kl(*reference(student, teachers, batch)[2][:1], reference(
        student, teachers, batch)[1]).mean())  # fmt: skip


# ---- an assistant's residual ----


class Fixed(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value)

    def forward(self, features, count):
        return self.value


def test_the_branches_rebuild_the_teacher_from_the_signed_residual_alone():
    teacher, assistant = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    lacking = residual_of(teacher, assistant, 0.0)
    torch.testing.assert_close(assistant + lacking, teacher)
    assert not torch.allclose(assistant + lacking.abs(), teacher)  # the absolute form cannot
    maps = [Fixed(assistant.clone()), Fixed(lacking.clone())]
    assert branches(teacher, teacher, assistant, maps, 0.0, 0.2).item() == 0
    assert residual_of(teacher, teacher, 0.6).abs().max() == 0
    assert (residual_of(teacher, assistant, 0.0) != 0).all()
    cut = residual_of(teacher, assistant, 0.6)
    assert 0 < (cut != 0).sum() < cut.numel() and (cut[cut != 0].abs() >= 0.6 * lacking.abs().max()).all()
    maps = [Fixed(torch.zeros(6, 4, dtype=torch.float64)) for _ in range(2)]
    loss = branches(teacher, teacher, assistant, maps, 0.0, 0.2)
    assert loss.item() == pytest.approx((assistant.square().mean() + 0.2 * lacking.square().mean()).item())
    loss.backward()
    torch.testing.assert_close(maps[0].value.grad, -2 * assistant / 24)
    torch.testing.assert_close(maps[1].value.grad, -0.4 * lacking / 24)


def test_an_assistant_is_matched_beside_the_teacher(tmp_path, pair):
    student, teachers = pair
    own = make_term("rest", "residual_match", Schedule(1, 1), options=(("assistant", "b"), ("threshold", 0.0)), teacher="a")
    samples = tiny_samples(tmp_path, 3, text_only=1)
    distiller = Distiller(student, teachers, [own])
    loss, _, ours = stepped(distiller, batch_of(student, teachers, samples, [own]))
    seen = [tower.see(batch_of(student, teachers, samples, [own]).student).features for tower in
            (student, teachers["a"].tower, teachers["b"].tower)]  # fmt: skip
    maps = distiller.extras["rest"]
    expected = [branches(*three, maps, 0.0, 0.2) for three in zip(*seen, strict=True)]
    assert loss.item() == pytest.approx((sum(expected) / 3).item(), rel=1e-6)
    assert any(name.startswith("student.") and g.abs().max() > 0 for name, g in ours.items())


# ---- the advantage of an aligned teacher ----


def own_answers(student, teachers, own, samples):
    dataset = PairDataset(samples, student, teachers, [own], generates=True)
    pairs = [dataset.answered(dataset[n], [40 + n, 50, 60]) for n in range(len(samples))]
    return dataset.collator(pairs)["batch"]


def test_the_expected_advantage_is_that_of_whole_logits_with_its_closed_gradient(tmp_path, pair):
    student, teachers = pair
    own = make_term("adpa", "adpa", Schedule(1, 1), options=(("reference", "b"),), teacher="a")
    distiller = Distiller(student, teachers, [own], chunk_bytes=2**16)
    batch = own_answers(student, teachers, own, tiny_samples(tmp_path, 3))
    loss, _, ours = stepped(distiller, batch)
    _, q, (a, b) = reference(student, teachers, batch)
    advantage = a - b
    assert loss.item() == pytest.approx(-(q.exp() * advantage).sum(-1).mean().item(), rel=2e-6)
    student.model.zero_grad()
    inputs = batch.student
    z = logits(student, inputs, inputs.response)
    closed = -(q.exp() * (advantage - (q.exp() * advantage).sum(-1, keepdim=True))).detach() / len(z)
    z.backward(closed)  # a constant added to the advantages of a row changes nothing of it
    for name, gradient in gradients(student.model).items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=1e-5, atol=1e-9, msg=name)


def test_equal_teachers_have_no_advantage(tmp_path, pair):
    student, teachers = pair
    same = {"a": teachers["a"], "b": LiveTeacher(tower(2, 32), "b")}
    own = make_term("adpa", "adpa", Schedule(1, 1), options=(("reference", "b"),), teacher="a")
    loss, _, ours = stepped(Distiller(student, same, [own]), own_answers(student, same, own, tiny_samples(tmp_path, 2)))
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert all(g.abs().max() < 1e-9 for g in ours.values())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "mixed_teachers", "teachers": {"a": 1}}, "two or more"),
        ({"kind": "mixed_teachers", "teachers": ["a", "b"]}, "give each a weight"),
        ({"kind": "mixed_teachers", "teachers": {"a": 0, "b": 0}}, "not all 0"),
        ({"kind": "mixed_teachers", "teachers": {"a": "x", "b": 1}}, "numbers from 0"),
        ({"kind": "confident_teachers", "teachers": ["a", "b"], "divergence": "cross_entropy"}, "compares logits"),
        ({"kind": "confident_teachers", "teachers": ["a", "b"], "divergence": "taid"}, "compares logits"),
        ({"kind": "confident_teachers", "teachers": ["a", "a"]}, "each once"),
        ({"kind": "confident_teachers", "teachers": "ab"}, "two or more"),
        ({"kind": "routed_teachers", "teachers": {"a": ["x"], "b": ["x"]}}, "given to two"),
        ({"kind": "routed_teachers", "teachers": {"a": [], "b": ["x"]}}, "the values that it teaches"),
        ({"kind": "gated_teachers", "teachers": ["a", "b"], "top_k": 3}, "between 1 and the 2"),
        ({"kind": "residual_match"}, "assistant: name one"),
        ({"kind": "adpa"}, "reference: name"),
    ],
)
def test_options_that_make_no_sense_are_named(given, words):
    with pytest.raises(ValidationError, match=words):
        TermSpec(**given)


def test_a_recipe_names_its_teachers(tmp_path):
    raw = {
        "title": "t", "output": "runs/x", "teachers": {"chart": {"model": "m"}, "photo": {"model": "n"}},
        "student": {"model": "s"},
        "stages": {"only": {"data": [{"format": "jsonl", "root": "d"}], "steps": 1, "terms": {
            "mix": {"kind": "confident_teachers", "teachers": ["chart", "foto"]}}}},
    }  # fmt: skip
    with pytest.raises(Exception, match="foto.*photo"):
        validate(raw, "test", Recipe)
    raw["stages"]["only"]["terms"]["mix"]["teachers"] = ["chart", "photo"]
    assert validate(raw, "test", Recipe).all_terms()["stages.only.terms.mix"].several == ("chart", "photo")


def test_a_top_k_teacher_is_refused_for_a_divergence_that_needs_all_logits(pair):
    from objectives import TopK

    from mmkd.errors import TowerError

    student, teachers = pair
    with pytest.raises(TowerError, match="reverse_kl weighs tokens"):
        Distiller(student, {**teachers, "b": TopK(teachers["b"].tower)}, [
            term("mixed_teachers", teachers={"a": 1, "b": 1}, divergence="reverse_kl")])  # fmt: skip

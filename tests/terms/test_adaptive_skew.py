"""DistiLLM-2's terms against whole logits in float64: the skew of each answer, both directions, the anchor."""

import json

import pytest
import torch
from objectives import (
    TOKENIZER,
    assert_refused_by_top_k,
    assert_refused_options,
    batch_of,
    gradients,
    logits,
    stepped,
    term,
    towers,
)
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tower

from mmkd.losses import AdaptiveSkewKL, AdaptiveSkewReverseKL, adaptive_lam, forward_kl, reverse_kl
from mmkd.train.distiller import Distiller

KINDS = {"adaptive_skew_kl": 1, "adaptive_skew_reverse_kl": -1}


def lams(log_q, log_p, targets, samples, anchor, sign, base=0.1, least=0.01):
    """The skew of each row, an answer at a time in plain Python."""
    found = {}
    for sample in set(samples.tolist()):
        rows = (samples == sample).nonzero()[:, 0].tolist()
        means = [sum(float(x[r, targets[r]]) for r in rows) / len(rows) for x in (log_p, log_q)]
        gap = sign * (torch.tensor(means).double().exp() @ torch.tensor([1.0, -1.0]).double()).item()
        found[sample] = (min(max(1 - (1 - base) * anchor / (gap + 1e-5), least), base), gap)
    return torch.tensor([found[s][0] for s in samples.tolist()], dtype=torch.float64), [gap for _, gap in found.values()]


def reference(kind, log_q, log_p, lam):
    q, p, a = log_q.exp(), log_p.exp(), lam[:, None]
    if kind == "adaptive_skew_kl":
        return (p * (log_p - (a * p + (1 - a) * q).log())).sum(-1).mean()
    return (q * (log_q - ((1 - a) * p + a * q).log().detach())).sum(-1).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", [None, 1e-3, -0.2])
def test_value_and_gradient_are_those_of_whole_logits(tmp_path, kind, anchor):
    student, teacher = towers()
    own = term(kind)
    distiller, batch = Distiller(student, teacher, [own], chunk_bytes=2**16), batch_of(
        student, teacher, tiny_samples(tmp_path, 3, text_only=1), [own]
    )
    if anchor is not None:
        distiller.extras[kind].state.copy_(torch.tensor([10.0, 10 * anchor]))
    loss, log, ours = stepped(distiller, batch)
    inputs = batch.student
    student.model.zero_grad()
    log_q = logits(student, inputs, inputs.response).log_softmax(-1)
    log_p = logits(teacher, inputs, inputs.response).log_softmax(-1).detach()
    samples, targets = inputs.response.nonzero()[:, 0], inputs.targets[inputs.response]
    lam, gaps = lams(log_q.detach(), log_p, targets, samples, anchor or 0.0, KINDS[kind])
    expected = reference(kind, log_q, log_p, torch.full_like(lam, 0.1) if anchor is None else lam)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for name, gradient in gradients(student.model).items():
        torch.testing.assert_close(ours[f"student.{name}"], gradient, rtol=1e-6, atol=1e-9, msg=name)
    total, count = log[f"{kind}_gap"]
    assert total.item() == pytest.approx(sum(gaps), rel=1e-5) and count == len(gaps)


def test_a_gap_that_vanishes_takes_the_least_skew_and_one_that_stays_the_largest():
    gap = torch.tensor([1e-9, 0.3, 0.2999, 0.0, -0.3, 3.0], dtype=torch.float64)
    found = adaptive_lam(gap, 0.3, 0.1, 0.01)
    assert found[0] == found[3] == 0.01 and found[1] == pytest.approx(0.1, abs=1e-4) and 0.09 < found[2] < 0.1001
    assert found[4] == found[5] == 0.1
    assert adaptive_lam(torch.tensor([0.29]), 0.3, 0.1, 0.01).item() == pytest.approx(1 - 0.9 * 0.3 / (0.29 + 1e-5), abs=1e-6)


def test_without_skew_the_two_are_forward_and_reverse_kl_and_at_equal_rows_nothing():
    torch.manual_seed(0)
    s, t, none = torch.randn(5, 30).double(), torch.randn(5, 30).double(), torch.full((5,), 1e-9)
    torch.testing.assert_close(AdaptiveSkewKL()(s, t, None, none), forward_kl(s, t), rtol=1e-6, atol=0)
    torch.testing.assert_close(AdaptiveSkewReverseKL()(s, t, None, none), reverse_kl(s, t), rtol=1e-6, atol=0)
    # On the same tokens at weights 2 - beta and beta: the symmetric sum at beta 1.
    both = AdaptiveSkewKL()(s, t, None, none) + AdaptiveSkewReverseKL()(s, t, None, none)
    torch.testing.assert_close(both, AdaptiveSkewKL()(t, s, None, none) + AdaptiveSkewReverseKL()(t, s, None, none))
    for loss in (AdaptiveSkewKL(), AdaptiveSkewReverseKL()):
        values, gradient = loss.value_and_grad(s, s.clone(), None, None, torch.full((5,), 0.1))
        assert values.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_the_mixture_of_the_reverse_form_is_detached():
    torch.manual_seed(1)
    s, t = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), torch.randn(4, 9, dtype=torch.float64)
    q, p = s.softmax(-1), t.softmax(-1)
    m = 0.7 * p + 0.3 * q
    found = AdaptiveSkewReverseKL().value_and_grad(s.detach(), t, None, None, torch.full((4,), 0.3, dtype=torch.float64))[1]
    for mixture, alike in ((m.detach(), True), (m, False)):
        (gradient,) = torch.autograd.grad((q * (q.log() - mixture.log())).sum(), s, retain_graph=True)
        assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-12) == alike


def test_the_anchor_is_the_mean_gap_of_the_first_steps_and_survives_a_stop(tmp_path):
    terms = {
        "given": {"kind": "adaptive_skew_kl", "positions": "given", "anchor_steps": 2,
                  "weight": {"start": 1, "end": 0.5, "over": 0.5}},
        "own": {"kind": "adaptive_skew_reverse_kl", "positions": "generated", "anchor_steps": 2},
    }
    samples, states, weights = tiny_samples(tmp_path / "pictures", 8), [], []
    for name, steps in (("a", 4), ("b", 4)):
        student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
        stage = tiny_stage(student, teacher, samples, terms, {"student": {"share": 0.5, "max_new_tokens": 4}, "data": 0.5},
                           steps=steps, log_every=1)  # fmt: skip
        trainer = tiny_stage_trainer(tmp_path / name, stage)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "stages" / "checkpoint-2") if name == "b" else None)
        states.append({key: extra.state.tolist() for key, extra in stage.distiller.extras.items()})
        weights.append({key: value.clone() for key, value in student.model.state_dict().items()})
    assert states[0] == states[1] and all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    for name, (steps, total) in states[0].items():
        assert steps == 2 and total == pytest.approx(log[0][f"{name}_gap"] + log[1][f"{name}_gap"], rel=1e-5)


def test_what_they_refuse():
    for kind in KINDS:
        assert_refused_by_top_k(term(kind), f"{kind}: {kind} needs all of the teacher's logits, the cache has top-8")
        assert_refused_options(kind, "least is 0.2 and lam 0.1", least=0.2)
        assert_refused_options(kind, "anchor_steps must be at least 1", anchor_steps=0)

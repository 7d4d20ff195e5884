"""The policy-gradient form of reverse KL against float64 computations."""

import pytest
import torch
from tiny import tiny_samples, tiny_stage, tiny_tokenizer, tiny_tower

from mmkd.terms.policy_gradient import returns

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_returns_are_discounted_sums_within_a_sample(gamma):
    torch.manual_seed(0)
    samples = torch.tensor([0] * 5 + [1] + [2] * 7)
    reward = torch.randn(len(samples), dtype=torch.float64)
    expected = [
        sum(gamma ** (later - row) * reward[later] for later in range(row, len(samples)) if samples[later] == samples[row])
        for row in range(len(samples))
    ]
    torch.testing.assert_close(returns(reward, samples, gamma), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_loss_and_gradient_are_those_of_a_plain_computation(tmp_path, gamma):
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    terms = {"pg": {"kind": "policy_gradient", "positions": "generated", "gamma": gamma}}
    stage = tiny_stage(student, teacher, tiny_samples(tmp_path, 6), terms, {"student": {"share": 1, "max_new_tokens": 6}})
    batch = stage.batch_of(5)
    loss, _ = stage.distiller(batch)
    loss.backward()
    found = student.head.weight.grad.clone()
    student.model.zero_grad()
    inputs = batch.student
    said = []
    for tower in (student, teacher):
        out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
        said.append(out.double().log_softmax(-1).gather(-1, inputs.targets.clamp(min=0)[..., None])[..., 0])
    q, p = said
    reward, where = (p - q).detach(), inputs.response
    total = 0.0
    for row in range(len(inputs.ids)):
        places = where[row].nonzero()[:, 0].tolist()
        for n, place in enumerate(places):
            ahead = sum(gamma**k * reward[row, later] for k, later in enumerate(places[n:]))
            total = total - ahead * q[row, place]
    expected = total / where.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, student.head.weight.grad, rtol=1e-4, atol=1e-6)


def test_its_expected_gradient_is_that_of_reverse_kl():
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    p = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    q = logits.log_softmax(-1)
    expected = torch.autograd.grad((q.exp() * (q - p)).sum(), logits)[0]
    q = logits.log_softmax(-1)
    sampled = -(q.exp().detach() * (p - q).detach() * q).sum()
    torch.testing.assert_close(torch.autograd.grad(sampled, logits)[0], expected)

"""GKD over beta and lambda against a reference of its own: NumPy, a row at a time, on logits made the ordinary way."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_samples, tiny_stage, tiny_tokenizer, tiny_tower

from mmkd import losses

TOKENIZER = tiny_tokenizer()


def divergence(q, p, beta):
    """GKD's generalised JSD of two distributions; at its ends the KLs."""
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_loss_of_a_step_is_the_mean_over_tokens_of_given_and_own_answers(tmp_path, share):
    student, teacher = tiny_tower(1, 16, tokenizer=TOKENIZER), tiny_tower(2, 32, tokenizer=TOKENIZER)
    samples = tiny_samples(tmp_path, 5, text_only=1)
    terms = {f"b{beta}": {"kind": "jsd", "beta": beta} for beta in (0, 0.1, 0.5, 0.9, 1)}
    terms |= {"forward": {"kind": "forward_kl"}, "reverse": {"kind": "reverse_kl"}}
    answers = {"student": {"share": share, "max_new_tokens": 4}, "data": 1 - share}
    stage = tiny_stage(student, teacher, samples, terms, answers)
    inputs = (batch := stage.batch_of(6)).student
    assert sum(inputs.own) == {0: 0, 1: 6}.get(share, sum(inputs.own)) and (share != 0.5 or 0 < sum(inputs.own) < 6)
    with torch.no_grad():
        _, log = stage.distiller(batch)
        q, p = (tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits.double()
                for tower in (student, teacher))  # fmt: skip
    rows = [(softmax(a.numpy()), softmax(b.numpy())) for a, b in zip(q[inputs.response], p[inputs.response], strict=True)]
    for name, (total, count) in log.items():
        beta = {"forward": 0, "reverse": 1}.get(name, None if name[0] != "b" else float(name[1:]))
        expected = sum(divergence(a, b, beta) for a, b in rows) / len(rows)
        assert (total / count).item() == pytest.approx(expected, rel=1e-5), name
    assert torch.equal(log["b0"][0], log["forward"][0]) and torch.equal(log["b1"][0], log["reverse"][0])


def test_the_limits_inside_are_the_kls_over_beta_and_the_middle_is_bounded():
    torch.manual_seed(0)
    s, t = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    small = 1e-7
    torch.testing.assert_close(losses.jsd(s, t, small) / small, losses.forward_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.jsd(s, t, 1 - small) / small, losses.reverse_kl(s, t), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.jsd(s, t, 0.5), losses.jsd(t, s, 0.5))
    far = 1e3 * torch.eye(40, dtype=torch.float64)
    assert losses.jsd(far, far.flip(0), 0.5).max() <= math.log(2) + 1e-12 and losses.jsd(s, t, 0.5).max() < math.log(2)

"""FIRST: the catalogue's checks, float64 references of the loss and of the calibration."""

import math

import numpy as np
import pytest
import torch

from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.losses import FIRST, calibrated_c, expected_calibration_error, forward_kl

BAR = 2e-6


def softmax(z):
    e = np.exp(np.asarray(z) - np.max(z))
    return e / e.sum()


def shares(x, temperature, loss):
    if loss.normalise == "softmax":
        return softmax(np.asarray(x) / temperature)
    raised = np.asarray(x) + loss.epsilon
    return raised / raised.sum()


def reference(z, ids, log_probs, loss):
    """One row, by the definition."""
    ids, p = ids[: loss.k], np.exp(log_probs[: loss.k])
    x = softmax(z)[ids]
    if loss.other:
        p, x = [*p, 1 - p.sum()], [*x, math.fsum(np.delete(softmax(z), ids))]
    t = shares(p, loss.c, loss)
    taken = min(loss.label_smoothing, t[0])
    t = np.array([t[0] - taken, *(t[1:] + taken / (len(t) - 1))])
    s = shares(x, loss.student_temperature, loss)
    return math.fsum(a * math.log(a / b) for a, b in zip(t, s, strict=True) if a > 0)


def draw(vocabulary=40, rows=6, known=8, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(vocabulary)
    s, t = (scale * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    log_probs, ids = t.to(dtype).log_softmax(-1).topk(min(known, vocabulary))
    return s.to(dtype), t.to(dtype), ids, log_probs


OPTIONS = [
    FIRST(),
    FIRST(c=0.3),
    FIRST(c=0.5, k=3, other=True),
    FIRST(c=0.2, label_smoothing=0.1, student_temperature=0.5),
    FIRST(normalise="linear"),
    FIRST(normalise="linear", other=True, label_smoothing=0.1),
    FIRST(c=0.1, label_smoothing=0.99, other=True),
]


@pytest.mark.parametrize("vocabulary", [6, 40, 3000])
@pytest.mark.parametrize("loss", OPTIONS, ids=str)
def test_float32_against_float64_reference(loss, vocabulary):
    s, _, ids, log_probs = draw(vocabulary, dtype=torch.float32)
    found = loss(s, None, None, ids, log_probs)
    assert found.dtype == torch.float32
    for value, z, i, p in zip(found.tolist(), s.double().numpy(), ids.numpy(), log_probs.double().numpy(), strict=True):
        expected = reference(z, i, p, loss)
        assert abs(value - expected) <= BAR * expected


def test_linear_over_the_whole_vocabulary_is_the_forward_kl():
    s, t, ids, log_probs = draw(known=40)
    for other in (False, True):
        loss = FIRST(k=40, normalise="linear", epsilon=0.0, other=other)
        torch.testing.assert_close(loss(s, None, None, ids, log_probs), forward_kl(s, t))
        torch.testing.assert_close(loss.value_and_grad(s, None, None, {}, ids, log_probs)[1], s.softmax(-1) - t.softmax(-1))


@pytest.mark.parametrize("loss", [FIRST(), FIRST(other=True), FIRST(c=0.4, student_temperature=0.4),
                                  FIRST(normalise="linear"), FIRST(normalise="linear", other=True)], ids=str)  # fmt: skip
def test_equal_models_cost_nothing(loss):
    _, t, ids, log_probs = draw()
    values, gradient = loss.value_and_grad(t + 2, None, None, {}, ids, log_probs)
    assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


def test_a_large_c_makes_the_target_even_and_a_small_one_sharp():
    *_, log_probs = draw()
    torch.testing.assert_close(FIRST(c=1e9).target(log_probs), torch.full((6, 5), 0.2, dtype=torch.float64))
    sharp, plain = FIRST(c=0.1).target(log_probs), FIRST(c=1.0).target(log_probs)
    assert (sharp[:, 0] > plain[:, 0]).all()
    for options in ({}, dict(other=True), dict(label_smoothing=0.7), dict(normalise="linear")):
        t = FIRST(**options).target(log_probs)
        torch.testing.assert_close(t.sum(-1), torch.ones(6, dtype=torch.float64))
        assert (t >= 0).all()


def test_label_smoothing_goes_to_the_others_in_equal_parts():
    *_, log_probs = draw()
    plain, smooth = FIRST(c=0.3).target(log_probs), FIRST(c=0.3, label_smoothing=0.1).target(log_probs)
    moved = torch.tensor([-0.1, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    torch.testing.assert_close(smooth - plain, moved.expand(6, 5))


def test_in_the_row_engine_without_teacher_rows():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator).double(), torch.randn(40, 8, generator=generator).double()
    _, _, ids, log_probs = draw()
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    loss = FIRST(c=0.3, other=True)
    term = RowTerm("first", 1.0, loss, False, mask, extra=(ids, log_probs))
    total, _ = row_losses(hidden.requires_grad_(), Head(weight), torch.zeros(6, dtype=torch.long), [term], chunk_bytes=40 * 8 * 4)
    expected = loss(hidden @ weight.T, None, None, ids, log_probs)[mask].sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (total, expected)))


# ---- calibration -----------------------------------------------------------------------------------------------------


def plain_error(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        rows = [i for i, x in enumerate(confidence) if b / bins < x <= (b + 1) / bins]
        if rows:
            total += abs(sum(correct[i] for i in rows) - sum(confidence[i] for i in rows))
    return total / len(confidence)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_a_loop(bins):
    generator = torch.Generator().manual_seed(bins)
    confidence, correct = torch.rand(300, generator=generator).double(), torch.rand(300, generator=generator) < 0.4
    found = expected_calibration_error(confidence, correct, bins)
    assert found == pytest.approx(plain_error(confidence.tolist(), correct.tolist(), bins), rel=1e-12)


def test_calibration_error_of_cases_with_known_numbers():
    sure = torch.ones(10)
    assert expected_calibration_error(sure, torch.ones(10, dtype=torch.bool)) == 0
    assert expected_calibration_error(sure, torch.zeros(10, dtype=torch.bool)) == 1
    half = torch.arange(10) < 5
    assert expected_calibration_error(sure / 2, half) == 0
    assert expected_calibration_error(torch.tensor([0.9, 0.1]), torch.tensor([True, False])) == pytest.approx(0.1, rel=1e-6)


def teacher(c, n=4000, seed=0):
    """Top-5 probabilities, and answers that are right as often as `softmax(P / c)` says."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(n, 30, generator=generator).double()).log_softmax(-1).topk(5).values
    confidence = FIRST(c).target(log_probs)[:, 0]
    return log_probs, torch.rand(n, generator=generator) < confidence


@pytest.mark.parametrize("c", [0.16, 0.3, 0.58])
def test_calibration_finds_the_c_that_the_answers_were_drawn_from(c):
    log_probs, correct = teacher(c)
    found = calibrated_c(log_probs, correct)
    assert abs(found - c) <= 0.06
    error = lambda x: plain_error(FIRST(x).target(log_probs)[:, 0].tolist(), correct.tolist(), 10)  # noqa: E731
    coarse = min((n / 10 for n in range(1, 11)), key=error)
    fine = [n / 100 for n in range(round(100 * coarse) - 8, round(100 * coarse) + 9, 2) if 0 < n <= 100]
    assert error(found) == pytest.approx(min(map(error, fine)), rel=1e-9)


def test_calibration_stays_between_0_and_1():
    log_probs, _ = teacher(0.5, 200)
    assert calibrated_c(log_probs, torch.zeros(200, dtype=torch.bool)) == 1.0  # as unsure as it can be
    assert 0 < calibrated_c(log_probs, torch.ones(200, dtype=torch.bool)) <= 0.1
    with pytest.raises(ValueError, match="no token to calibrate on"):
        calibrated_c(log_probs[:0], torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("options, words", [
    (dict(c=0), "c is 0"),
    (dict(student_temperature=-1), "student_temperature -1"),
    (dict(k=1), "k is 1"),
    (dict(normalise="l2"), "normalise is 'l2'.*softmax, linear"),
    (dict(label_smoothing=1), "label_smoothing is 1"),
    (dict(epsilon=-1), "epsilon -1"),
])  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        FIRST(**options)


def test_fewer_tokens_than_k():
    s, _, ids, log_probs = draw(known=4)
    with pytest.raises(ValueError, match="k is 5, but of the teacher 4 tokens are known"):
        FIRST()(s, None, None, ids, log_probs)

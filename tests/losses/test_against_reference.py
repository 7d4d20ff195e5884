"""Every loss against float64 code of its own (numpy, one row, one pair at a time) on random inputs: relative error <= 2e-6.

The inputs are float32; both sides start from the same numbers. What a specification calls wrong is computed too and must differ.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from mmkd import losses

BAR = 2e-6
EDGE = -math.inf


def draw(seed, *shape, scale=2.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).float()


def plain(x):
    return x.detach().double().numpy()


def log_softmax(z):
    top = z.max()
    return z - top - math.log(np.exp(z - top).sum())


def assert_close(found, expected, bar=BAR):
    found, expected = np.atleast_1d(plain(found)), np.atleast_1d(np.asarray(expected, dtype=np.float64))
    assert found.shape == expected.shape
    error = np.abs(found - expected) / np.maximum(np.abs(expected), 1e-300)
    assert error.max() <= bar, f"relative error {error.max():.1e}"


def differs(a, b, by=1e-3):
    a, b = np.atleast_1d(np.asarray(a, float)), np.atleast_1d(np.asarray(b, float))
    return bool((np.abs(a - b) > by * np.abs(b)).all())


# ---- divergences -----------------------------------------------------------------------------------------------------


def divergence(name, s, t, temperature, beta=0.5):
    log_q, log_p = log_softmax(s / temperature), log_softmax(t / temperature)
    q, p = np.exp(log_q), np.exp(log_p)
    if name == "forward":
        value = (p * (log_p - log_q)).sum()
    elif name == "reverse":
        value = (q * (log_q - log_p)).sum()
    else:
        log_m = np.log(beta * p + (1 - beta) * q)
        value = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum()
    return value * temperature**2


DIVERGENCES = {
    "forward": lambda s, t, temperature: losses.forward_kl(s, t, temperature),
    "reverse": lambda s, t, temperature: losses.reverse_kl(s, t, temperature),
    "jsd 0.5": lambda s, t, temperature: losses.jsd(s, t, 0.5, temperature),
    "jsd 0.1": lambda s, t, temperature: losses.jsd(s, t, 0.1, temperature),
    "jsd 0.9": lambda s, t, temperature: losses.jsd(s, t, 0.9, temperature),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocabulary", [2, 8, 50, 5000])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name, vocabulary, temperature):
    """Also where hardly anything is left of the difference: few columns, high temperatures, faint or nearly equal logits."""
    for scale, apart in ((3.0, 3.0), (0.3, 0.3), (2.0, 1e-2)):
        t = draw(vocabulary, 8, vocabulary, scale=scale)
        s = t + draw(vocabulary + 1, 8, vocabulary, scale=apart)
        kind, _, beta = name.partition(" ")
        expected = [divergence(kind, a, b, temperature, float(beta or 0)) for a, b in zip(plain(s), plain(t), strict=True)]
        found = DIVERGENCES[name](s, t, temperature)
        assert found.dtype == torch.float32
        assert_close(found, expected)


def test_jsd_between_its_ends():
    s, t = draw(1, 4, 30), draw(2, 4, 30)
    for beta in (0.01, 0.3, 0.77, 0.999):
        expected = [divergence("jsd", a, b, 1.0, beta) for a, b in zip(plain(s), plain(t), strict=True)]
        assert_close(losses.jsd(s, t, beta), expected)


def test_cross_entropy():
    s, targets = draw(3, 16, 5000, scale=4.0), torch.arange(16) * 11
    s[0, 0] = 30  # a sure answer: the loss is tiny
    expected = [-log_softmax(row)[n] for row, n in zip(plain(s), targets.tolist(), strict=True)]
    assert_close(losses.cross_entropy(s, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_gives_the_value_of_its_own_numbers(dtype):
    """Half precision comes out as float32, computed from the very numbers that came in."""
    s, t = draw(4, 3, 200).to(dtype), draw(5, 3, 200).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    targets = torch.tensor([1, 2, 3])
    router, mined = draw(6, 9, 4).to(dtype), torch.tensor([[0, 1, 2]] * 3)
    for function in (
        lambda a, b: losses.forward_kl(a, b, 2.0),
        lambda a, b: losses.reverse_kl(a, b),
        lambda a, b: losses.jsd(a, b, 0.2),
        lambda a, b: losses.cross_entropy(a, targets),
        lambda a, b: losses.dbild(a, b),
        lambda a, b: losses.relation(a, b),
        lambda a, b: losses.feature_match(a, b),
        lambda a, b: losses.dpo(a[0], a[1], b[0], b[1]),
        lambda a, b: losses.kto_pair(a[0], a[1], b[0], b[1]),
        lambda a, b: losses.contrastive_partial_ranking(a / 8, b.sigmoid()[:, :3], mined, 0.1),
        lambda a, b: losses.load_balance(router.to(a.dtype)),
        lambda a, b: losses.choose_experts(router.to(a.dtype))[0],
    ):
        found, exact = function(s, t), function(s.double(), t.double())
        assert found.dtype == wide
        if dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(found.double(), exact, rtol=BAR, atol=0)
    for function in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.dbild):
        torch.testing.assert_close(function(s, t).double(), function(s.double(), t.double()), rtol=BAR, atol=0)


@pytest.mark.parametrize("k", [1, 7, 50])
def test_top_k_forward_kl(k):
    """Also where every token is among the k and nothing is left."""
    s, t = draw(8, 5, 50), draw(9, 5, 50)
    top = t.double().log_softmax(-1).topk(k)
    tail = torch.log((1 - top.values.exp().sum(-1)).clamp(min=0)) if k < 50 else torch.full((5,), EDGE, dtype=torch.float64)
    expected = []
    for row, ids, log_p, left in zip(plain(s), top.indices.numpy(), plain(top.values), plain(tail), strict=True):
        q, p, rest = np.exp(log_softmax(row)), np.exp(log_p), math.exp(left)
        others = np.delete(q, ids).sum()
        expected.append((p * (log_p - np.log(q[ids]))).sum() + (rest * (left - math.log(others)) if rest else 0.0))
    leaf = s.clone().requires_grad_()
    found = losses.top_k_forward_kl(leaf, top.indices, top.values, tail)
    assert_close(found, expected)
    found.sum().backward()
    _, closed = losses.TopKForwardKL().value_and_grad(s, None, None, None, top.indices, top.values, tail)
    torch.testing.assert_close(leaf.grad, closed, rtol=1e-4, atol=1e-6)


# ---- difference of logits --------------------------------------------------------------------------------------------


def knee(values, window, min_k, max_k=None, inclusive=True):
    """values: all logits of one row."""
    top = sorted(values, reverse=True)[:window]
    gaps = []
    for i, value in enumerate(top):
        flat = top[0] == top[-1]
        gaps.append(0.0 if flat else 1 - i / (len(top) - 1) - (value - top[-1]) / (top[0] - top[-1]))
    k = gaps.index(max(gaps)) + (1 if inclusive else 0)
    return min(max(k, min_k), max_k or len(top), len(top))


def pair_log_probs(z, chosen, temperature):
    differences = [(z[a] - z[b]) / temperature for n, a in enumerate(chosen) for b in chosen[n + 1 :]]
    return log_softmax(np.array(differences))


def dbild_row(s, t, temperature=3.0, window=64, min_k=4, max_k=None, direction="reverse", tau_squared=False, fixed_k=None,
              inclusive=True):  # fmt: skip
    total = 0.0
    for leader in (t, s):
        k = min(fixed_k, len(s)) if fixed_k else knee(leader, window, min_k, max_k, inclusive)
        if k < 3:
            continue
        chosen = np.argsort(-leader, kind="stable")[:k].tolist()
        log_q, log_p = pair_log_probs(s, chosen, temperature), pair_log_probs(t, chosen, temperature)
        over, under = (log_q, log_p) if direction == "reverse" else (log_p, log_q)
        total += (np.exp(over) * (over - under)).sum()
    return total * temperature**2 if tau_squared else total


OPTIONS = [
    {}, {"window": 8}, {"window": 16, "min_k": 3}, {"window": 256}, {"window": 10_000}, {"temperature": 1.0},
    {"temperature": 10.0}, {"fixed_k": 3}, {"fixed_k": 8}, {"fixed_k": 64}, {"fixed_k": 10_000, "temperature": 5.0},
    {"direction": "forward"}, {"tau_squared": True}, {"max_k": 5}, {"inclusive": False, "min_k": 3}, {"min_k": 9, "max_k": 12},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [3, 40, 5000])
def test_dbild(vocabulary, options):
    """Also with windows and k larger than the vocabulary."""
    if vocabulary == 5000 and max(options.get("fixed_k", 0), options.get("window", 0)) > 5000:
        options = {**options, "window": 300} if "window" in options else {**options, "fixed_k": 90}
    s, t = draw(vocabulary, 4, vocabulary, scale=3.0), draw(vocabulary + 7, 4, vocabulary, scale=3.0)
    expected = [dbild_row(a, b, **options) for a, b in zip(plain(s), plain(t), strict=True)]
    assert_close(losses.dbild(s, t, **options), expected)
    assert_close(losses.DBiLD(**options).value_and_grad(s, t, None)[0], expected)


def test_dbild_of_nearly_equal_rows():
    t = draw(11, 6, 1000, scale=3.0)
    s = t + draw(12, 6, 1000, scale=1e-2)
    assert_close(losses.dbild(s, t), [dbild_row(a, b) for a, b in zip(plain(s), plain(t), strict=True)])


@pytest.mark.parametrize("inclusive", [True, False])
def test_knee(inclusive):
    for seed in range(5):
        row = draw(seed, 400, scale=3.0)
        for window, min_k, max_k in ((8, 1, None), (64, 4, None), (64, 1, 5), (400, 3, 50)):
            top = row.topk(window).values[None]
            found = losses.kneedle_k(top, min_k, max_k, inclusive).item()
            assert found == knee(plain(row).tolist(), window, min_k, max_k, inclusive)


def test_ties_take_the_first_knee_and_the_order_of_indices():
    t = torch.tensor([[3.0, 3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0]])
    flat = torch.full((1, 10), 0.7)
    assert losses.kneedle_k(torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]), 1).item() == 1  # on the chord everywhere
    assert losses.kneedle_k(flat, 1).item() == 1 and losses.kneedle_k(flat, 4).item() == 4
    assert losses.dbild(t, t).item() == 0
    s = draw(13, 1, 10)
    assert_close(losses.dbild(s, t, window=10), dbild_row(plain(s)[0], plain(t)[0], window=10))
    assert_close(losses.dbild(flat, s, min_k=10), dbild_row(plain(flat)[0], plain(s)[0], min_k=10))
    half = draw(99, 4, 300).bfloat16()  # 8 bits: dozens of equal logits
    expected = [dbild_row(a, b, fixed_k=300) for a, b in zip(plain(half), plain(half.flip(0)), strict=True)]
    assert_close(losses.dbild(half, half.flip(0), fixed_k=300), expected)


def test_a_masked_vocabulary_is_a_smaller_one():
    """Columns of -inf in both models are no columns at all, for every loss on logits."""
    s, t = draw(14, 5, 60), draw(15, 5, 60)
    hidden = torch.full((5, 40), EDGE)
    wide_s, wide_t = torch.cat([hidden, s], -1), torch.cat([hidden, t], -1)
    for function in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.dbild):
        torch.testing.assert_close(function(wide_s, wide_t), function(s, t), rtol=1e-6, atol=0)
    targets = torch.arange(5)
    torch.testing.assert_close(losses.cross_entropy(wide_s, targets + 40), losses.cross_entropy(s, targets), rtol=1e-6, atol=0)


def test_no_rows_and_one_row():
    none, one = torch.zeros(0, 30), draw(16, 1, 30)
    targets = torch.zeros(0, dtype=torch.long)
    for function in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.dbild):
        leaf = none.clone().requires_grad_()
        function(leaf, none).sum().backward()
        assert function(none, none).shape == (0,) and leaf.grad.shape == (0, 30)
        assert function(one, one + 1).abs().item() < 1e-12
    assert losses.cross_entropy(none, targets).shape == (0,)
    assert losses.relation(one, 5 * one).item() == 0  # one visual token relates to nothing
    assert losses.contrastive_partial_ranking(none, none[:, :2], none[:, :2].long(), 0.1).shape == (0,)
    assert losses.dpo(*[torch.zeros(0)] * 4).shape == (0,)
    assert losses.load_balance(torch.zeros(0, 4)).item() == 0


def test_one_single_column_has_nothing_to_tell():
    s, t = draw(17, 3, 1), draw(18, 3, 1)
    for function in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.dbild):
        assert function(s, t).abs().max().item() == 0


# ---- relation --------------------------------------------------------------------------------------------------------


def relation(s, t):
    a, b = [[float(x @ y) for y in m for x in m] for m in (s, t)]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


@pytest.mark.parametrize("width", [3, 300, 5000])
def test_relation(width):
    s, t = draw(width, 12, width), draw(width + 1, 12, width // 2 + 1)
    assert_close(losses.relation(s, t), relation(plain(s), plain(t)))
    near = s + draw(19, 12, width, scale=0.1)
    assert_close(losses.relation(near, s), relation(plain(near), plain(s)))


def test_relation_of_hidden_states_is_an_option():
    h_s, h_t, w_s, w_t = draw(20, 9, 8), draw(21, 9, 10), draw(22, 200, 8), draw(23, 200, 10)
    grams = losses.head_gram(w_s), losses.head_gram(w_t)
    by_logits = losses.relation_from_hidden(h_s, grams[0], h_t, grams[1])
    by_hidden = losses.relation_from_hidden(h_s, None, h_t, None, source="hidden")
    assert_close(by_logits, relation(plain(h_s) @ plain(w_s).T, plain(h_t) @ plain(w_t).T))
    assert_close(by_hidden, relation(plain(h_s), plain(h_t)))
    assert differs(by_hidden, by_logits)
    with pytest.raises(ValueError, match="source is 'tokens'"):
        losses.relation_from_hidden(h_s, None, h_t, None, source="tokens")


def test_relation_of_a_flattened_batch_is_another_loss():
    """LLaVA-KD's trainer takes one cosine over all images of a batch: images with large logits dominate it."""
    s, t = draw(24, 2, 6, 30), draw(25, 2, 6, 30) * torch.tensor([1.0, 4.0])[:, None, None]
    each = [losses.relation(a, b).item() for a, b in zip(s, t, strict=True)]
    stacked = [np.concatenate([(x @ x.T).ravel() for x in plain(m)]) for m in (s, t)]
    flattened = 1 - stacked[0] @ stacked[1] / (np.linalg.norm(stacked[0]) * np.linalg.norm(stacked[1]))
    assert differs(flattened, sum(each) / 2)


# ---- ranking ---------------------------------------------------------------------------------------------------------


def ranking(s, p, mined, tau, threshold=0.1, top_m=None, margin=None, ceiling=None, mean=False, easy=()):
    there = [i for i in range(len(mined)) if mined[i] >= 0 and (ceiling is None or p[i] < ceiling)]
    order = sorted(there, key=lambda i: -p[i])
    if len(order) < 2:
        return 0.0
    total, used = 0.0, 0
    for j, i in enumerate(order):
        valid = j < top_m if top_m is not None else p[i] >= threshold
        close = margin is not None and any(p[a] - p[b] < margin for a, b in itertools.pairwise(order[: j + 2]))
        if not valid or close:
            break
        against = [s[mined[m]] / tau for m in order[j:]] + [s[e] / tau for e in easy]
        top = max(against)
        total += top + math.log(math.fsum(math.exp(x - top) for x in against)) - s[mined[i]] / tau
        used += 1
    return total / max(used, 1) if mean else total


CHOICES = [
    {}, {"threshold": 0.5}, {"threshold": 0.0}, {"threshold": 2.0}, {"top_m": 3}, {"top_m": 100}, {"margin": 0.05},
    {"margin": 0.02, "top_m": 6}, {"ceiling": 0.8}, {"ceiling": 0.05}, {"rank_reduction": "mean_valid"}, {"easy": True},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("tau", [0.01, 0.07, 1.0])
def test_contrastive_partial_ranking(tau, choice):
    generator = torch.Generator().manual_seed(5)
    s, p = torch.rand(9, 50, generator=generator) * 2 - 1, torch.rand(9, 16, generator=generator)
    positives = torch.eye(9, 50, dtype=torch.bool)
    mined = losses.hard_negatives(s, positives, 16)
    mined[0, 10:], mined[1, 1:], mined[2] = -1, -1, -1
    options = dict(choice)
    easy = torch.zeros(9, 50, dtype=torch.bool)
    if options.pop("easy", False):
        easy = ~positives
        easy[torch.arange(9)[:, None].expand_as(mined)[mined >= 0], mined[mined >= 0]] = False
        options["easy"] = easy
    found = losses.contrastive_partial_ranking(s, p, mined, tau, **options)
    plain_options = {k: v for k, v in choice.items() if k not in ("rank_reduction", "easy")}
    plain_options["mean"] = "rank_reduction" in choice
    expected = [
        ranking(plain(s)[i], plain(p)[i], mined[i].tolist(), tau, easy=easy[i].nonzero().flatten().tolist(), **plain_options)
        for i in range(9)
    ]
    np.testing.assert_allclose(plain(found), expected, rtol=BAR, atol=1e-12)
    assert found[2] == 0 and (np.count_nonzero(expected) > 0 or choice == {"threshold": 2.0} or "ceiling" in choice)


def test_ceiling_takes_probable_positives_out():
    s, p = draw(26, 1, 5) / 5, torch.tensor([[0.95, 0.4, 0.6, 0.2]])
    mined = torch.tensor([[1, 2, 3, 4]])
    without = losses.contrastive_partial_ranking(s, p, mined, 0.1, ceiling=0.9)
    fewer = losses.contrastive_partial_ranking(s, p[:, 1:], mined[:, 1:], 0.1)
    torch.testing.assert_close(without, fewer)
    assert differs(without.item(), losses.contrastive_partial_ranking(s, p, mined, 0.1).item())
    assert losses.valid_negatives(p, mined, ceiling=0.9).item() == 3 and losses.valid_negatives(p, mined).item() == 4


def test_ranking_without_a_temperature_is_another_loss():
    s, p = draw(27, 3, 9) / 5, torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mined = torch.tensor([[1, 2, 3, 4]] * 3)
    assert differs(losses.contrastive_partial_ranking(s, p, mined, 0.07), losses.contrastive_partial_ranking(s, p, mined, 1.0))


def test_contrastive():
    s = draw(28, 7, 20) / 5
    positives = torch.eye(7, 20, dtype=torch.bool)
    positives[2, 5], positives[3, 9] = True, True
    expected = [-log_softmax(row / 0.05)[own].mean() for row, own in zip(plain(s), positives.numpy(), strict=True)]
    assert_close(losses.contrastive(s, positives, 0.05), expected)


# ---- preference ------------------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_preference(beta):
    four = [draw(n, 6, scale=20.0) - 60 for n in range(30, 34)]
    cs, rs, ct, rt = (plain(x) for x in four)
    margins = [beta * ((a - c) - (b - d)) for a, b, c, d in zip(cs, rs, ct, rt, strict=True)]
    log1p = [math.log1p(math.exp(-abs(m))) + max(-m, 0) for m in margins]
    turned = [math.log1p(math.exp(-abs(m))) + max(m, 0) for m in margins]
    assert_close(losses.dpo(*four, beta), log1p)
    assert_close(losses.dpo(*four, beta, 0.2), [0.8 * a + 0.2 * b for a, b in zip(log1p, turned, strict=True)])
    np.testing.assert_allclose(plain(losses.dpo(*four, beta, form="hinge")), [max(0, 1 - m) for m in margins], rtol=BAR)
    assert_close(losses.dpo(*four, beta, form="ipo"), [(m / beta - 1 / (2 * beta)) ** 2 for m in margins])
    kl = [max(0.0, float((x - y).mean())) for x, y in ((cs, ct), (rs, rt))]
    chosen = [1 - sigmoid(beta * (a - c - kl[1])) for a, c in zip(cs, ct, strict=True)]
    rejected = [1 - sigmoid(beta * (kl[0] - (b - d))) for b, d in zip(rs, rt, strict=True)]
    np.testing.assert_allclose(plain(losses.kto_pair(*four, beta)), chosen + rejected, rtol=BAR, atol=1e-15)


def test_forms_of_dpo_are_different_losses_and_wrong_ones_are_refused():
    four = [draw(n, 4) for n in range(40, 44)]
    values = [losses.dpo(*four, form=form).tolist() for form in ("sigmoid", "hinge", "ipo")]
    assert differs(values[0], values[1]) and differs(values[0], values[2]) and differs(values[1], values[2])
    for wrong in ({"form": "square"}, {"form": "hinge", "label_smoothing": 0.1}):
        with pytest.raises(ValueError, match="choose sigmoid, or hinge or ipo without smoothing"):
            losses.dpo(*four, **wrong)


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 8])
def test_load_balance(experts):
    router, mask = draw(experts, 40, experts), torch.arange(40) % 3 > 0
    gates = [np.exp(log_softmax(row)) for row, real in zip(plain(router), mask, strict=True) if real]
    share = np.bincount([int(g.argmax()) for g in gates], minlength=experts) / len(gates)
    expected = experts * float((np.mean(gates, axis=0) * share).sum())
    assert_close(losses.load_balance(router, mask), expected)
    assert_close(losses.balance_of_layers([router, router], mask), 2 * expected)
    assert differs(losses.load_balance(router), expected)  # counting the padding


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_choose_experts(top_k, capacity_factor):
    router = draw(60 + top_k, 30, 5)
    gates = np.stack([np.exp(log_softmax(row)) for row in plain(router)])
    order = np.argsort(-gates, axis=1)[:, :top_k]
    room = [math.inf if capacity_factor is None else math.ceil(30 / 5 * top_k * capacity_factor)] * 5
    expected = np.zeros((30, top_k))
    for choice in range(top_k):
        for token in range(30):
            expert = order[token, choice]
            if room[expert] > 0:
                room[expert] -= 1
                expected[token, choice] = gates[token, expert]
    expected /= np.maximum(expected.sum(1, keepdims=True), np.finfo(np.float32).eps)
    weights, experts = losses.choose_experts(router, top_k, capacity_factor=capacity_factor)
    assert np.array_equal(experts.numpy(), order)
    np.testing.assert_allclose(plain(weights), expected, rtol=BAR, atol=0)


def test_noise_moves_second_choices_only():
    router = draw(70, 400, 6)
    torch.manual_seed(0)
    _, plainly = losses.choose_experts(router)
    weights, noisy = losses.choose_experts(router, second_choice_noise=True)
    assert torch.equal(plainly[:, 0], noisy[:, 0]) and (plainly[:, 1] != noisy[:, 1]).any()
    assert (noisy[:, 0] != noisy[:, 1]).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(400))


# ---- features --------------------------------------------------------------------------------------------------------


def test_features():
    s, t = draw(80, 5, 300), draw(81, 5, 300)
    near = s + draw(82, 5, 300, scale=1e-2)
    for a, b in ((s, t), (near, s)):
        x, y = plain(a), plain(b)
        d = np.abs(x - y)
        cosine = [((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2).sum() / 2 for u, v in zip(x, y, strict=True)]
        assert_close(losses.feature_match(a, b), cosine)
        assert_close(losses.feature_match(a, b, "mse"), (d**2).mean(1))
        assert_close(losses.feature_match(a, b, "smooth_l1"), np.where(d < 1, d**2 / 2, d - 0.5).mean(1))


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients_of():
    """Name -> (function of float64 leaves, leaves): every function with every option that changes its maths."""
    def wide(*x):
        return tuple(y.double().requires_grad_() for y in x)

    s, t = draw(90, 3, 9), draw(91, 3, 9).double()
    mined = torch.tensor([[1, 2, 3, 4], [0, 5, 6, -1], [7, 8, 0, 1]])
    p = torch.rand(3, 4, generator=torch.Generator().manual_seed(3))
    easy = torch.zeros(3, 9, dtype=torch.bool)
    easy[:, 8], easy[2, 8], easy[2, 4] = True, False, True
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    four = [draw(n, 4) for n in range(92, 96)]
    kl = (torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64))
    grams = losses.head_gram(draw(96, 40, 9).double()), losses.head_gram(draw(97, 40, 9).double())
    positives = torch.eye(3, 9, dtype=torch.bool)
    found = {
        "forward": (lambda x: losses.forward_kl(x, t, 2.0), wide(s)),
        "reverse": (lambda x: losses.reverse_kl(x, t, 2.0), wide(s)),
        "cross entropy": (lambda x: losses.cross_entropy(x, torch.tensor([1, 0, 8])), wide(s)),
        "relation": (lambda x: losses.relation(x, t), wide(s)),
        "relation of logits": (lambda x: losses.relation_from_hidden(x, grams[0], t, grams[1]), wide(s)),
        "relation of hidden": (lambda x: losses.relation_from_hidden(x, None, t, None, source="hidden"), wide(s)),
        "contrastive": (lambda x, y: losses.contrastive(x, positives, y), (*wide(s), tau)),
        "balance": (lambda x: losses.load_balance(x, torch.tensor([True, False, True])), wide(s)),
        "gate": (lambda x: losses.choose_experts(x)[0], wide(s)),
        "gate with queue": (lambda x: losses.choose_experts(x, capacity_factor=0.5)[0], wide(s)),
        "kto detached": (lambda x, y: losses.kto_pair(x, y, four[2], four[3], kl=kl), wide(*four[:2])),
        "kto attached": (lambda x, y: losses.kto_pair(x, y, four[2], four[3], detach_kl=False), wide(*four[:2])),
        "tags": (lambda x: losses.tags(x, positives), wide(s)),
        "top k": (lambda x: losses.top_k_forward_kl(x, mined.clamp(min=2), t.gather(-1, mined.clamp(min=2)), t[:, 0]), wide(s)),
    }  # fmt: skip
    for beta in (0.0, 0.3, 1.0):
        found[f"jsd {beta}"] = (lambda x, b=beta: losses.jsd(x, t, b, 1.5), wide(s))
    for options in OPTIONS:
        found[f"dbild {options}"] = (lambda x, o=options: losses.dbild(x, t, **o), wide(s))
    for form in ("sigmoid", "hinge", "ipo"):
        found[f"dpo {form}"] = (lambda x, y, f=form: losses.dpo(x, y, four[2], four[3], form=f), wide(*four[:2]))
    found["dpo smoothed"] = (lambda x, y: losses.dpo(x, y, four[2], four[3], label_smoothing=0.2), wide(*four[:2]))
    for distance in ("cosine", "mse", "smooth_l1"):
        found[f"features {distance}"] = (lambda x, d=distance: losses.feature_match(x, t, d), wide(s))
    for choice in ({}, {"top_m": 2}, {"margin": 0.05}, {"ceiling": 0.9}, {"rank_reduction": "mean_valid"}, {"easy": easy}):
        found[f"ranking {list(choice)}"] = (
            lambda x, y, c=choice: losses.contrastive_partial_ranking(x, p, mined, y, 0.2, **c), (*wide(s), tau)
        )  # fmt: skip
    return found


GRADIENTS = gradients_of()


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_numerical_differentiation(name):
    function, leaves = GRADIENTS[name]
    assert torch.autograd.gradcheck(function, leaves)


def drawn_spans(vocabularies=(40, 56), groups=6, matched=25):
    """Next-token log-probabilities of two vocabularies, the tokens that stand there, and the rest of each span."""
    draw = torch.Generator().manual_seed(3)
    sides = []
    for width in vocabularies:
        log_p = torch.randn(groups, width, generator=draw, dtype=torch.float64).mul(3).log_softmax(-1)
        first = torch.randint(width, (groups,), generator=draw)
        sides.append((log_p, first, -2 * torch.rand(groups, generator=draw, dtype=torch.float64)))
    pairs = torch.stack([torch.randperm(width, generator=draw)[:matched] for width in vocabularies])
    return sides, pairs


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_spans_against_plain_sums(beta):
    sides, pairs = drawn_spans()
    halves = [losses.span_events(log_p.float(), first, following.float()) for log_p, first, following in sides]
    value = losses.spans(*halves, pairs, beta)
    for g in range(6):
        events, profiles = [], []
        for (log_p, first, following), ids in zip(sides, pairs, strict=True):
            p = np.exp(log_p[g].numpy())
            span = p[first[g]] * np.exp(following[g].item())
            p[first[g]] -= span
            rest = np.delete(p, ids.numpy())
            events.append(np.array([span, *p[ids.numpy()], rest.sum()]))
            profiles.append(np.sort(rest)[::-1])
        q, p = events
        mixture = beta * p + (1 - beta) * q
        forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
        between = beta * (p * np.log(p / mixture)).sum() + (1 - beta) * (q * np.log(q / mixture)).sum()
        divergence = {0.0: forward, 1.0: reverse}.get(beta, between)
        width = max(len(x) for x in profiles)
        longer = [np.pad(x, (0, width - len(x))) for x in profiles]
        share = len(pairs[0]) / 56
        expected = share * divergence + (1 - share) * np.abs(longer[0] - longer[1]).sum()
        assert value[g].item() == pytest.approx(expected, rel=2e-6)


def test_gradients_of_spans_equal_numerical_differentiation():
    (own, other), pairs = drawn_spans((7, 9), 3, 4)

    def loss(log_p, following):
        return losses.spans(losses.span_events(log_p, own[1], following), losses.span_events(*other), pairs, 0.3)

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (own[0], own[2])])


def test_every_function_of_the_package_is_here():
    """A new loss gets a reference and a gradient test too."""
    tested = {
        "contrastive", "contrastive_partial_ranking", "cross_entropy", "dbild", "dpo", "feature_match", "forward_kl", "jsd",
        "kto_pair", "load_balance", "relation", "relation_from_hidden", "reverse_kl", "tags", "choose_experts",
        "balance_of_layers", "top_k_forward_kl", "spans", "sorted_distance", "span_events",
    }  # fmt: skip
    parts = {"head_gram", "kneedle_k", "hard_negatives", "valid_negatives", "calibrated_c", "expected_calibration_error",
             "log_mean_perplexity", "span_pairs", "union_of_top"}  # no losses: tested with those that use them
    functions = {name for name in losses.__all__ if not isinstance(getattr(losses, name), type)}
    elsewhere = {"top_k_jsd", "adaptive_lam"}  # in test_topk.py, and in tests/terms/test_adaptive_skew.py
    assert functions == tested | parts | elsewhere


# ---- what the specifications warn of ---------------------------------------------------------------------------------


def test_other_losses_under_the_name_of_dbild():
    """Third-party versions: top-k without differences (a union, symmetric, times T²), the knee on probabilities or over all."""
    s, t = draw(120, 1, 3000, scale=3.0), draw(121, 1, 3000, scale=3.0)
    own = losses.dbild(s, t).item()
    a, b = plain(s)[0], plain(t)[0]
    union = sorted({*np.argsort(-a)[:64], *np.argsort(-b)[:64]})
    log_q, log_p = log_softmax(a[union] / 2), log_softmax(b[union] / 2)
    symmetric = ((np.exp(log_q) - np.exp(log_p)) * (log_q - log_p)).sum() / 2
    assert differs(symmetric, own) and differs(4 * symmetric, own)
    k = losses.kneedle_k(t.topk(64).values).item()
    on_probabilities, everywhere = knee(np.exp(log_softmax(b)).tolist(), 64, 4), knee(b.tolist(), 3000, 4)
    assert on_probabilities != k and differs(dbild_row(a, b, fixed_k=on_probabilities), own)
    assert everywhere > 10 * k and differs(losses.dbild(s, t, window=3000).item(), own)
    assert differs(losses.dbild(s, t, tau_squared=True).item(), own)
    assert differs(losses.dbild(s, t, direction="forward").item(), own, by=1e-4)


def test_reference_points_of_single_samples_are_another_loss():
    """LLaVA-MoD's code runs paired KTO with one sample a device: each is then its own reference point."""
    four = [draw(n, 5, scale=10.0) for n in range(130, 134)]
    whole = losses.kto_pair(*four).view(2, 5)
    alone = torch.stack([losses.kto_pair(*(x[i : i + 1] for x in four)) for i in range(5)], 1)  # [2, 5]
    assert (whole - alone).abs().max() > 1e-2


def test_a_mean_over_the_batch_is_no_mean_over_rows():
    """Losses give one value a row: sums and counts belong to the caller, so that a batch can be cut anywhere."""
    s, t = draw(140, 6, 40), draw(141, 6, 40)
    for function in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.dbild):
        whole = function(s, t)
        parts = torch.cat([function(s[:1], t[:1]), function(s[1:4], t[1:4]), function(s[4:], t[4:])])
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(function(s[order], t[order]), whole[order], rtol=1e-6, atol=0)

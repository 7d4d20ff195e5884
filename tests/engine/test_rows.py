"""The row engine: equal to whole logits in float64, whatever the chunks, heads, masks and dtypes; and flat in
memory."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mmkd.engine import products
from mmkd.engine import walk as engine
from mmkd.engine.rows import Head, RowTerm, row_log_probs, row_losses
from mmkd.losses import JSD, CrossEntropy, DBiLD, ForwardKL, ReverseKL, forward_kl

R, V, DS, DT = 23, 190, 12, 20
LOSSES = [
    CrossEntropy(),
    ForwardKL(),
    ForwardKL(2.0),
    ReverseKL(),
    JSD(0.5),
    JSD(0.1, 2.0),
    DBiLD(window=32),
    DBiLD(fixed_k=8),
]


def make(dtype=torch.float32, trained=False, bias=False, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, b = normal(V, DS), normal(V) if bias else None
    for x in (weight, b) if trained else ():
        if x is not None:
            x.requires_grad_()
    return {
        "hidden": normal(R, DS).requires_grad_(),
        "head": Head(weight, b, **options),
        "targets": torch.randint(0, V, (R,), generator=generator),
        "teacher_hidden": normal(R, DT),
        "teacher_head": Head(normal(V, DT) / 2, normal(V) if bias else None),
    }


def run(data, terms, **options):
    return row_losses(
        data["hidden"],
        data["head"],
        data["targets"],
        terms,
        **{"teacher_hidden": data["teacher_hidden"], "teacher_head": data["teacher_head"], **options},
    )


def logits(hidden, head, vocabulary=None):
    x = hidden @ head.weight.T
    x = (x if head.bias is None else x + head.bias)[:, :vocabulary] * head.scale
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def exact(data, terms, vocabulary=None):
    """All logits at once, in float64, through autograd: total, sums and the gradients of all leaves."""
    leaves = {}

    def double(x):
        if x is None:
            return None
        leaves[id(x)] = x.detach().double().requires_grad_(x.requires_grad)
        return leaves[id(x)]

    def double_head(h):
        return dataclasses.replace(h, weight=double(h.weight), bias=double(h.bias))

    head = double_head(data["head"])
    student = logits(double(data["hidden"]), head, vocabulary)
    teacher = logits(double(data["teacher_hidden"]), double_head(data["teacher_head"]), vocabulary)
    sums, total = {}, 0.0
    for term in terms:
        keep = slice(None) if term.rows is None else term.rows
        sums[term.name] = term.loss(student[keep], teacher[keep], data["targets"][keep]).sum()
        total = total + term.weight * sums[term.name]
    wanted = [
        data["hidden"],
        *(x for x in (data["head"].weight, data["head"].bias) if x is not None and x.requires_grad),
    ]
    return total, sums, wanted, torch.autograd.grad(total, [leaves[id(x)] for x in wanted])


def compare(data, terms, tolerance=1e-5, vocabulary=None, **options):
    total, sums = run(data, terms, vocabulary=vocabulary, **options)
    exact_total, exact_sums, wanted, exact_gradients = exact(data, terms, vocabulary)
    gradients = torch.autograd.grad(total, wanted)
    torch.testing.assert_close(total.detach().double(), exact_total.detach(), rtol=tolerance, atol=tolerance)
    assert set(sums) == set(exact_sums)
    for name, value in sums.items():
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), exact_sums[name].detach(), rtol=tolerance, atol=tolerance)
    for x, found, expected in zip(wanted, gradients, exact_gradients, strict=False):
        assert found.dtype == x.dtype and found.shape == x.shape
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def every_term():
    return [RowTerm(str(x), 0.5 + i, x, not isinstance(x, CrossEntropy)) for i, x in enumerate(LOSSES)]


@pytest.mark.parametrize("chunk_bytes", [1, 20 * V, 400 * V, 2**28])
@pytest.mark.parametrize("trained", [False, True])
def test_all_terms_together(chunk_bytes, trained):
    compare(make(trained=trained), every_term(), chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_each_term_alone(loss, block, monkeypatch):
    monkeypatch.setattr(engine, "_CPU_BLOCK_BYTES", block * V * 4)
    compare(make(trained=True), [RowTerm("x", 0.7, loss, True)], chunk_bytes=8 * V * 10)


@pytest.mark.parametrize(
    "options",
    [dict(bias=True), dict(softcap=3.0), dict(scale=0.3), dict(bias=True, softcap=5.0, scale=1.7)],
    ids=str,
)
@pytest.mark.parametrize("trained", [False, True])
def test_bias_scale_softcap(options, trained):
    compare(make(trained=trained, **options), every_term(), chunk_bytes=100 * V)


def test_float64_stays_float64():
    compare(make(torch.float64, trained=True, bias=True), every_term(), tolerance=1e-11, chunk_bytes=100 * V)
    total, sums = run(make(torch.float64), every_term())
    assert total.dtype == sums[str(LOSSES[0])].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL(), ReverseKL(), JSD(0.5)], ids=str)
def test_half_precision_heads(dtype, loss):
    data = make(dtype, trained=True, bias=True)
    compare(data, [RowTerm("x", 1.0, loss, True)], tolerance=3e-2, chunk_bytes=100 * V)
    assert run(data, [RowTerm("x", 1.0, loss, True)])[0].dtype == torch.float32


def rounded_only(data, terms, factor, **options):
    """The gradients are those of whole float64 logits of the same inputs, off by `factor` times what rounding them once costs."""
    total, _ = run(data, terms, **options)
    exact_total, _, wanted, exact_gradients = exact(data, terms)
    torch.testing.assert_close(total.detach().double(), exact_total.detach(), rtol=1e-5, atol=1e-5)
    for x, found, expected in zip(wanted, torch.autograd.grad(total / 3, wanted), exact_gradients, strict=True):
        expected = expected / 3
        unavoidable = (expected.to(x.dtype).double() - expected).norm()
        assert found.dtype == x.dtype
        assert (found.double() - expected).norm() <= factor * unavoidable + 1e-6 * expected.norm()


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_half_precision_costs_one_rounding_of_the_gradient(dtype, loss, seed):
    # Logits rounded to the head's dtype, or a gradient rounded before the incoming factor, would cost more; in DBiLD a
    # hundred times as much, because other logits are chosen.
    data = make(dtype, trained=True, bias=True, softcap=20.0, seed=seed)
    rounded_only(data, [RowTerm("x", 1.0, loss, True)], 1.01, chunk_bytes=100 * V)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_devices_whose_products_of_halves_end_in_float32(dtype, loss, monkeypatch):
    # What runs on CUDA, with the product in float32 put in the place of its kernel. The gradient at the logits is rounded too.
    monkeypatch.setattr(products, "writes_float32", lambda device, dtype: True)
    monkeypatch.setattr(products, "wide_mm", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))
    for options in ({}, {"bias": True, "softcap": 20.0, "scale": 1.3}):
        rounded_only(make(dtype, trained=True, **options), [RowTerm("x", 1.0, loss, True)], 2.0, chunk_bytes=100 * V)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALF)
def test_products_of_halves_on_cuda(dtype):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 64, generator=generator).to("cuda", dtype) for n in (8, 3000))
    found = {}
    for wide in (True, False):
        product = products.HeadProduct(weight, 2**16)
        if not wide:
            product.wide, product.tile, product.gradient_dtype, product.gain = False, 100, torch.float32, 1.0
        found[wide] = product.logits(product.rows(rows), torch.empty(8, 3000, device="cuda"))
        assert found[wide].dtype == torch.float32
        assert (found[wide].double() - rows.double() @ weight.double().T).abs().max() < 1e-3
    assert products.writes_float32(weight.device, dtype)


def test_a_product_that_writes_halves_is_found_out(monkeypatch):
    def rounds(a, b, out):
        return out.copy_(torch.mm(a, b) + 0.5)

    monkeypatch.setattr(products, "wide_mm", rounds)
    products.writes_float32.cache_clear()
    assert not products.writes_float32(torch.device("cpu"), torch.bfloat16)
    products.writes_float32.cache_clear()


def test_float16_gradients_of_small_probabilities_survive():
    generator = torch.Generator().manual_seed(0)
    hidden = (0.01 * torch.randn(4, 8, generator=generator)).half().requires_grad_()
    weight, teacher = (torch.randn(60000, 8, generator=generator).half() for _ in range(2))
    data = dict(hidden=hidden, head=Head(weight), targets=torch.zeros(4, dtype=torch.long),
                teacher_hidden=hidden.detach(), teacher_head=Head(teacher))  # fmt: skip
    compare(data, [RowTerm("kl", 1.0, ForwardKL(), True)], tolerance=5e-2)  # p is about 2e-5, q - p far below


def test_mixed_dtypes_and_autocast():
    data = make()
    data["teacher_hidden"], data["teacher_head"] = (
        data["teacher_hidden"].bfloat16(),
        Head(data["teacher_head"].weight.bfloat16()),
    )
    plain = run(data, every_term())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = run(data, every_term())[0]
    assert torch.equal(total, plain)
    # Not DBiLD: where rounding changes which logits are chosen, it jumps.
    smooth = [term for term in every_term() if not isinstance(term.loss, DBiLD)]
    compare(data, smooth, tolerance=3e-2)


SPARSE = [DBiLD(window=8), DBiLD(window=8, direction="forward", temperature=1.5), DBiLD(fixed_k=4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("loss", SPARSE, ids=str)
def test_gradients_of_few_entries_are_looked_up(loss, options, dtype, monkeypatch):
    # Equal to whole logits, and no product with the whole head in backward.
    monkeypatch.setattr(engine, "_LOOK_UP", 1)
    monkeypatch.setattr(products.HeadProduct, "to_hidden", None)
    data = make(dtype, **options)
    keep = masks()[0]
    for rows in (None, keep):
        rounded_only(data, [RowTerm("x", 0.7, loss, True, rows)], 1.01, chunk_bytes=30 * V)
    monkeypatch.setattr(engine, "_groups", lambda terms, rows: [(None, list(range(len(terms))))])
    rounded_only(data, [RowTerm("x", 1.0, loss, True, keep), RowTerm("seen", 0.0, CrossEntropy(), False)], 1.01)


def test_gradients_of_few_entries_with_other_terms_or_a_trained_head(monkeypatch):
    monkeypatch.setattr(engine, "_LOOK_UP", 1)
    sparse = RowTerm("dbild", 0.7, SPARSE[0], True)
    compare(make(trained=True), [sparse], chunk_bytes=30 * V)
    compare(make(), [sparse, RowTerm("ce", 1.0, CrossEntropy(), False)], chunk_bytes=30 * V)
    weighted = dataclasses.replace(sparse, row_weights=torch.linspace(0.1, 2, R))
    data = make()
    (found,) = torch.autograd.grad(run(data, [weighted], chunk_bytes=30 * V)[0], data["hidden"])
    monkeypatch.setattr(engine, "_LOOK_UP", V)
    (dense,) = torch.autograd.grad(run(data, [weighted])[0], data["hidden"])
    torch.testing.assert_close(found, dense)


def masks():
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(R, generator=generator) < 0.5 for _ in range(3)]


def masked_terms():
    a, b, c = masks()
    return [
        RowTerm("ce", 1.0, CrossEntropy(), False, a),
        RowTerm("kl", 0.5, ForwardKL(), True, a),
        RowTerm("visual", 2.0, ReverseKL(), True, b),
        RowTerm("dbild", 0.3, DBiLD(window=32), True, c),
    ]


def test_row_masks():
    compare(make(trained=True), masked_terms(), chunk_bytes=40 * V)
    compare(make(trained=True), [*masked_terms(), RowTerm("all", 1.0, JSD(), True)], chunk_bytes=40 * V)


def test_masks_that_multiply(monkeypatch):
    # What runs where the masks are on an accelerator: no grouping.
    monkeypatch.setattr(engine, "_groups", lambda terms, rows: [(None, list(range(len(terms))))])
    compare(make(trained=True), masked_terms(), chunk_bytes=40 * V)


@pytest.mark.parametrize("grouped", [True, False])
def test_rows_that_do_not_count_may_hold_anything(grouped, monkeypatch):
    if not grouped:
        monkeypatch.setattr(engine, "_groups", lambda terms, rows: [(None, list(range(len(terms))))])
    keep = masks()[0]
    data = make()
    terms = [RowTerm("ce", 1.0, CrossEntropy(), False, keep), RowTerm("kl", 1.0, forward_kl_rows, True, keep)]
    total, _ = run(data, terms)
    (clean,) = torch.autograd.grad(total, data["hidden"])
    data["targets"][~keep] = -100
    data["teacher_hidden"][~keep] = float("nan")
    total_again, _ = run(data, terms)
    (gradient,) = torch.autograd.grad(total_again, data["hidden"])
    torch.testing.assert_close(total_again, total)
    torch.testing.assert_close(gradient, clean)
    assert (gradient[~keep] == 0).all()


def forward_kl_rows(student, teacher, targets):
    return forward_kl(student, teacher)


def test_rows_without_a_use_are_not_computed(monkeypatch):
    made = []
    original = engine._logits
    monkeypatch.setattr(
        engine, "_logits", lambda raw, *rest: made.append(raw.shape[0]) or original(raw, *rest)
    )
    some = torch.arange(R) < 5
    run(
        make(),
        [
            RowTerm("ce", 1.0, CrossEntropy(), False, torch.arange(R) < 9),
            RowTerm("kl", 1.0, ForwardKL(), True, some),
        ],
    )
    assert sum(made) == 9 + 5  # student rows, teacher rows


def test_vocabulary_cut():
    data = make(trained=True, bias=True)
    data["targets"] = data["targets"] % 150
    data["teacher_head"] = Head(torch.cat([data["teacher_head"].weight, torch.full((7, DT), 99.0)]))
    compare(data, every_term(), vocabulary=150, chunk_bytes=40 * V)
    total, _ = run(data, every_term(), vocabulary=150)
    (to_weight,) = torch.autograd.grad(total, data["head"].weight)
    assert (to_weight[150:] == 0).all()
    with pytest.raises(ValueError, match=r"190 columns and the teacher head 197.*vocabulary=len"):
        run(data, every_term())


def test_no_rows():
    data = make(trained=True)
    for key in ("hidden", "targets", "teacher_hidden"):
        data[key] = data[key][:0]
    total, sums = run(data, every_term())
    assert total == 0 and all(x == 0 for x in sums.values())
    total.backward()
    assert (data["head"].weight.grad == 0).all()
    total, sums = row_losses(
        data["hidden"], data["head"], data["targets"], [RowTerm("ce", 1.0, CrossEntropy(), False)]
    )
    assert total.requires_grad and sums["ce"] == 0


def test_permuting_rows():
    data, order = make(), torch.randperm(R, generator=torch.Generator().manual_seed(1))
    total, _ = run(data, every_term())
    (gradient,) = torch.autograd.grad(total, data["hidden"])
    for key in ("targets", "teacher_hidden"):
        data[key] = data[key][order]
    data["hidden"] = data["hidden"].detach()[order].requires_grad_()
    total_again, _ = run(data, every_term())
    (permuted,) = torch.autograd.grad(total_again, data["hidden"])
    torch.testing.assert_close(total_again, total)
    torch.testing.assert_close(permuted, gradient[order])


def test_split_into_calls_adds_up():
    data, terms = make(), every_term()
    whole, _ = run(data, terms)
    parts = 0.0
    for part in (slice(0, 9), slice(9, R)):
        piece = {**data, **{k: data[k][part] for k in ("hidden", "targets", "teacher_hidden")}}
        parts = parts + run(piece, terms)[0]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JSD(0.3), DBiLD(window=8)], ids=str)
def test_gradcheck(loss):
    data = make(torch.float64, softcap=4.0)
    data["hidden"] = data["hidden"].detach()[:3].requires_grad_()
    data["targets"], data["teacher_hidden"] = data["targets"][:3], data["teacher_hidden"][:3]

    def total(hidden):
        return run({**data, "hidden": hidden}, [RowTerm("x", 1.5, loss, True)], chunk_bytes=16 * V)[0]

    assert torch.autograd.gradcheck(total, data["hidden"])


def test_plain_callables_go_through_autograd():
    def gap(student, teacher, targets):
        return (student - teacher).square().mean(-1)

    def plain_sum(student, teacher, targets):  # its gradient is one number expanded
        return student.sum(-1)

    compare(make(trained=True), [RowTerm("gap", 0.1, gap, True), RowTerm("sum", 0.2, plain_sum, False),
                                 RowTerm("kl", 1.0, ForwardKL(), True)], chunk_bytes=40 * V)  # fmt: skip


def test_the_same_head_on_both_sides():
    # The visual switch: rows of the teacher's language model with gradient, read by the teacher's own frozen
    # head.
    data = make()
    data["hidden"] = (data["teacher_hidden"] + 0.3).requires_grad_()
    data["head"] = data["teacher_head"]
    compare(data, every_term())


def test_only_the_head_is_trained():
    data = make(trained=True)
    data["hidden"] = data["hidden"].detach()
    total, _ = run(data, every_term())
    (found,) = torch.autograd.grad(total, data["head"].weight)
    full = make(trained=True)
    (expected,) = torch.autograd.grad(run(full, every_term())[0], full["head"].weight)
    torch.testing.assert_close(found, expected)


def test_without_gradient():
    data = make()
    expected, sums = run(data, every_term())
    with torch.no_grad():
        total, again = run(data, every_term())
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(again, sums)
    with torch.inference_mode():
        data["teacher_hidden"] = data["teacher_hidden"] + 0  # a teacher may come from inference mode
    run(data, every_term())[0].backward()


def test_weight_zero_is_watched_only():
    data = make()
    total, sums = run(
        data, [RowTerm("kl", 0.0, ForwardKL(), True), RowTerm("ce", 1.0, CrossEntropy(), False)]
    )
    alone, _ = run(data, [RowTerm("ce", 1.0, CrossEntropy(), False)])
    assert sums["kl"] > 0
    assert torch.equal(
        torch.autograd.grad(total, data["hidden"])[0], torch.autograd.grad(alone, data["hidden"])[0]
    )


def test_accumulation_scaling_and_second_backward():
    data = make(trained=True)
    (run(data, every_term())[0] / 4).backward()
    once = data["head"].weight.grad.clone(), data["hidden"].grad.clone()
    total, _ = run(data, every_term())
    (total / 4).backward(retain_graph=True)
    torch.testing.assert_close(data["head"].weight.grad, 2 * once[0])
    torch.testing.assert_close(data["hidden"].grad, 2 * once[1])
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing(reentrant):
    data = make(trained=True)
    layer = torch.nn.Linear(DS, DS)

    def step(x):
        return run({**data, "hidden": layer(x)}, every_term())[0]

    x = data["hidden"].detach().requires_grad_()
    step(x).backward()
    expected = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close((x.grad, layer.weight.grad), expected)


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    data, kept = make(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        total, _ = run(data, every_term())
    held = [x for x in vars(total.grad_fn).get("gradients", total.grad_fn.gradients) if x is not None]
    assert [tuple(x.shape) for x in held] == [(R, DS)]
    assert not any(V in shape for shape in kept)


def allocated(call):
    """Most bytes that the allocator had given out at once during the call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(0).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [CrossEntropy(), ForwardKL(), ReverseKL(), JSD(0.5), DBiLD(window=32)], ids=str)
def test_memory_is_that_of_one_row_however_many(loss, dtype):
    # One row fills the budget. What grows is the gradient of the hidden rows, in float32, and a value a row.
    columns, width, many = 10000, 8, 40
    chunk_bytes = 4 * columns * 4
    weight, teacher = (torch.randn(columns, width).to(dtype) for _ in range(2))

    def step(rows):
        hidden, theirs = (torch.randn(rows, width).to(dtype) for _ in range(2))
        hidden.requires_grad_()
        targets = torch.zeros(rows, dtype=torch.long)
        options = dict(teacher_hidden=theirs, teacher_head=Head(teacher), chunk_bytes=chunk_bytes)
        return lambda: row_losses(hidden, Head(weight), targets, [RowTerm("x", 1.0, loss, True)], **options)[0].backward()

    one, all_of_them = (allocated(step(rows)) for rows in (1, many))
    stored = many * (width + 1) * 4
    assert one > columns * 4
    assert all_of_them - stored <= 1.1 * one


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JSD(0.5), DBiLD(window=32)], ids=str)
def test_memory_stays_within_the_budget(loss):
    columns, width, rows = 3000, 8, 1000  # 1000 rows of logits are 11 MiB
    budget = 2 * 2**20
    hidden = torch.randn(rows, width, requires_grad=True)
    options = dict(teacher_hidden=torch.randn(rows, width), teacher_head=Head(torch.randn(columns, width)), chunk_bytes=budget)
    head, targets = Head(torch.randn(columns, width)), torch.zeros(rows, dtype=torch.long)
    terms = [RowTerm("x", 1.0, loss, True)]
    peak = allocated(lambda: row_losses(hidden, head, targets, terms, **options)[0].backward())
    assert peak <= 1.1 * budget + rows * (width + 1) * 4


MEMORY = """
    import resource, torch
    from mmkd.engine.rows import Head, RowTerm, row_losses
    from mmkd.losses import ForwardKL, JSD

    torch.set_num_threads(1)
    v, head, teacher = 20000, Head(torch.randn(20000, 16)), Head(torch.randn(20000, 16))

    def step(rows):
        hidden = torch.randn(rows, 16, requires_grad=True)
        terms = [RowTerm("kl", 1.0, ForwardKL(), True), RowTerm("jsd", 1.0, JSD(), True)]
        total, _ = row_losses(hidden, head, torch.zeros(rows, dtype=torch.long), terms,
                              teacher_hidden=torch.randn(rows, 16), teacher_head=teacher, chunk_bytes=16 *
                              2**20)
        total.backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    step(100)
    before = step(200)
    print(step(2000) - before)
"""


def test_memory_does_not_grow_with_the_rows():
    # 2000 rows of 20000 logits are 153 MiB a tensor; the engine's budget is 16 MiB.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30


def test_errors():
    data = make()
    ce, kl = RowTerm("ce", 1.0, CrossEntropy(), False), RowTerm("kl", 1.0, ForwardKL(), True)
    cases = [
        ("own name", [ce, ce], {}),
        (r"\['kl'\] need the teacher", [kl], dict(teacher_hidden=None, teacher_head=None)),
        ("go together", [kl], dict(teacher_head=None)),
        ("22 teacher rows", [kl], dict(teacher_hidden=data["teacher_hidden"][1:])),
        ("vocabulary is 500", [ce], dict(vocabulary=500)),
        ("chunk_bytes is 0", [ce], dict(chunk_bytes=0)),
        ("bool mask", [dataclasses.replace(ce, rows=torch.ones(R))], {}),
        ("do not fit the head", [kl], dict(teacher_head=Head(torch.zeros(V, 3)))),
    ]
    for words, terms, options in cases:
        with pytest.raises(ValueError, match=words):
            run(data, terms, **options)
    with pytest.raises(ValueError, match="targets have shape"):
        run({**data, "targets": data["targets"][1:]}, [ce])


# ---- log-probabilities of rows


def log_probs(data, **options):
    return row_log_probs(data["hidden"], data["head"], data["targets"], **options)


def exact_log_probs(data, vocabulary=None):
    """The same through whole logits in float64, and the leaves that they hang on."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (data["hidden"], data["head"].weight))
    bias = None if data["head"].bias is None else data["head"].bias.detach().double().requires_grad_()
    x = logits(hidden, dataclasses.replace(data["head"], weight=weight, bias=bias), vocabulary)
    values = x.log_softmax(-1).gather(-1, data["targets"][:, None])[:, 0]
    return values, [leaf for leaf in (hidden, weight, bias) if leaf is not None]


@pytest.mark.parametrize("chunk_bytes", [1, 4000, 2**20])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"scale": 0.5, "softcap": 3.0}])
def test_log_probs_equal_whole_logits_for_any_function_of_them(chunk_bytes, options):
    data = make(trained=True, **options)
    weights = torch.randn(R, generator=torch.Generator().manual_seed(1))
    found = log_probs(data, chunk_bytes=chunk_bytes)
    expected, leaves = exact_log_probs(data)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    given = [data["hidden"], data["head"].weight, data["head"].bias][: len(leaves)]
    ours = torch.autograd.grad((found * weights).mean().sigmoid(), given)
    theirs = torch.autograd.grad((expected * weights.double()).mean().sigmoid(), leaves)
    for own, other in zip(ours, theirs, strict=True):
        assert other.norm() > 1e-3 and (own.double() - other).norm() <= 1e-5 * other.norm()


def test_log_probs_of_a_cut_vocabulary_a_frozen_head_and_no_rows():
    data = make()
    data["targets"] = data["targets"] % 100
    torch.testing.assert_close(log_probs(data, vocabulary=100).double(), exact_log_probs(data, 100)[0], rtol=1e-5, atol=1e-5)
    log_probs(data).sum().backward()
    assert data["hidden"].grad is not None and data["head"].weight.grad is None
    none = log_probs(data | {"hidden": data["hidden"][:0], "targets": data["targets"][:0]})
    assert none.shape == (0,) and none.requires_grad


def test_log_probs_gradcheck():
    data = make(torch.float64, trained=True, bias=True)

    def values(hidden, weight, bias):
        return row_log_probs(hidden[:4], Head(weight, bias), data["targets"][:4], chunk_bytes=2000)

    inputs = (data["hidden"], data["head"].weight, data["head"].bias)
    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


def test_log_probs_keep_nothing_as_wide_as_the_vocabulary_but_the_head():
    data = make(trained=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        log_probs(data)
    assert sorted(kept) == [(R, DS), (V, DS)]


def test_row_weights_multiply_values_and_gradients():
    data = make(trained=True)
    weights = torch.rand(R, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(R) % 3 > 0
    term = RowTerm("ce", 2.0, CrossEntropy(), False, rows, weights)
    expected, leaves = exact_log_probs(data)
    value = -(expected * weights * rows).sum()
    exact_gradients = torch.autograd.grad(2 * value, leaves)
    watched = RowTerm("kl", 0.0, ForwardKL(), True)
    for terms in ([term], [term, watched]):
        total, sums = run(data, terms, chunk_bytes=5000)
        assert sums["ce"].item() == pytest.approx(value.item(), rel=1e-5)
        found = torch.autograd.grad(total, [data["hidden"], data["head"].weight])
        for own, other in zip(found, exact_gradients, strict=True):
            assert (own.double() - other).norm() <= 1e-5 * other.norm()
    with pytest.raises(ValueError, match="row_weights is"):
        run(data, [dataclasses.replace(term, row_weights=weights[:3])])

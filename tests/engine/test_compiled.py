"""Compiled loss maths: the eager engine's numbers, few graphs, flat memory, and a clear word where nothing can be compiled."""

import shutil

import pytest
import torch
from tiny import make_term, tiny_samples, tiny_tokenizer, tiny_tower
from torch.profiler import ProfilerActivity, profile

from mmkd.engine import compiled as module
from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.errors import RecipeError
from mmkd.losses import JSD, CrossEntropy, DBiLD, ForwardKL, ReverseKL, TopKForwardKL
from mmkd.terms.term import Schedule
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")

R, V, DS, DT = 23, 190, 12, 20
TEACHING = (ForwardKL(2.0), ReverseKL(), JSD(0.3))


def make(dtype=torch.float32, trained=False, rows=R, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    data = dict(hidden=normal(rows, DS), weight=normal(V, DS), theirs=normal(rows, DT), teacher=normal(V, DT) / 2)
    data = {name: x.to(dtype) for name, x in data.items()}
    data["hidden"].requires_grad_()
    data["weight"].requires_grad_(trained)
    return data | {"targets": torch.randint(0, V, (rows,), generator=generator)}


def terms(scale=1.0, rows=R, top_k=True):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(rows, generator=generator) < 0.6
    found = [RowTerm(str(loss), 0.7 * scale, loss, True) for loss in TEACHING]
    found.append(RowTerm("dbild", 0.3 * scale, DBiLD(window=16), True))
    found.append(RowTerm("ce", 1.3 * scale, CrossEntropy(), False, mask, row_weights=torch.rand(rows, generator=generator)))
    if top_k:
        log_p, ids = torch.randn(rows, V, generator=generator).log_softmax(-1).topk(5)
        extra = (ids, log_p, torch.log1p(-log_p.exp().sum(-1)))
        found.append(RowTerm("top_k", 0.5 * scale, TopKForwardKL(), False, extra=extra))
    return [*found, RowTerm("watched", 0.0, JSD(), True)]


def run(data, terms, compiled, chunk_bytes=100 * V):
    total, sums = row_losses(
        data["hidden"], Head(data["weight"]), data["targets"], terms, teacher_hidden=data["theirs"],
        teacher_head=Head(data["teacher"]), chunk_bytes=chunk_bytes, compiled=compiled,
    )
    leaves = [x for x in data.values() if x.requires_grad]
    return total.detach(), sums, torch.autograd.grad(total, leaves)


def double(data):
    return {n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for n, x in data.items()}


def close(found, wanted, tolerance):
    assert ((found - wanted).norm() / wanted.norm()).item() < tolerance


def compare(data, terms, tolerance=1e-5, **options):
    found = run(data, terms, True, **options)
    for wanted in (run(data, terms, False, **options), run(double(data), terms, False, **options)):
        close(found[0], wanted[0], tolerance)
        for name, value in wanted[1].items():
            close(found[1][name], value, tolerance)
        for mine, theirs in zip(found[2], wanted[2], strict=True):
            close(mine, theirs, tolerance)


@pytest.mark.parametrize("loss", [CrossEntropy(), *TEACHING, DBiLD(window=16)])
def test_each_loss_equals_the_eager_one_and_float64(loss):
    compare(make(), [RowTerm("x", 0.7, loss, True)])


def test_all_together_with_masks_weights_and_a_trained_head():
    compare(make(trained=True), terms())


def test_half_precision_heads():
    data = make(torch.bfloat16)
    found, wanted = (run(data, terms(), compiled) for compiled in (True, False))
    close(found[0], wanted[0], 1e-5)
    close(found[2][0].double(), wanted[2][0].double(), 1e-2)  # both rounded to bfloat16 once, not always to the same side


def test_impossible_tokens_and_equal_models_stay_finite():
    data = make()
    x = torch.randn(4, V)
    x[:, :3], y = -torch.inf, x.clone()
    y[:, 5] = -torch.inf
    for loss in TEACHING:
        part = module.Part(loss, True, 1.0, None, None, ())
        (values,), gradient = module.block_losses(x, y, data["targets"][:4] + 10, [part])
        wanted, expected = loss.value_and_grad(x, y, None, {})
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.fixture
def graphs():
    """How many graphs were compiled since."""
    from torch._dynamo.utils import counters

    module._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def test_one_graph_serves_all_block_sizes_and_weights(graphs):
    for step, rows in enumerate((23, 7, 40, 11, 64, 3, 9)):
        both = [RowTerm("kl", 1 + step / 7, ForwardKL(), True), RowTerm("ce", 2.0 - step / 7, CrossEntropy(), False)]
        run(make(rows=rows, seed=step), both, True, chunk_bytes=(200 + 80 * step) * V)
    assert 1 <= graphs() <= 2  # blocks of one row, and of more


def test_many_sets_of_terms_do_not_use_up_one_limit(graphs):
    with torch._dynamo.config.patch(recompile_limit=1):  # as each function has one graph here
        for number in range(2):
            part = module.Part(ForwardKL(1.0 + number), True, 1.0, None, None, ())
            x, y = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(number))
            module.block_losses(x, y, torch.zeros(3, dtype=torch.long), [part])
    assert graphs() == 2


def most_allocated(data, terms, compiled, **options):
    """The least of three measurements: what else the process does meanwhile can only add to one."""
    return min(_most_allocated(data, terms, compiled, **options) for _ in range(3))


def _most_allocated(data, terms, compiled, **options):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(data, terms, compiled, **options)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max())


@pytest.mark.parametrize("loss", TEACHING)
def test_memory_is_no_more_than_the_eager_engines_and_flat_in_the_rows(loss):
    peaks = {}
    for rows in (64, 512):
        data, one = make(rows=rows), [RowTerm("x", 1.0, loss, True)]
        run(data, one, True, chunk_bytes=400 * V)
        peaks[rows] = [most_allocated(data, one, compiled, chunk_bytes=400 * V) for compiled in (True, False)]
    for mine, eager in peaks.values():
        assert mine <= eager * 1.05
    stored = (512 - 64) * 4 * (2 * DS + DT + 4)  # hidden rows of both models, a gradient, a value and a target each
    assert peaks[512][0] - peaks[64][0] <= stored


def test_a_machine_without_a_compiler_is_told_at_the_start(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RecipeError, match=r"compile is true.*no working C\+\+ compiler found; install a C\+\+ compiler"):
        module.check_compiler.__wrapped__(torch.device("cpu"))


def test_a_step_of_towers_is_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    student, teacher = (tiny_tower(seed, width, tokenizer=tokenizer) for seed, width in ((1, 16), (2, 32)))
    kinds = {"ce": ("cross_entropy", "response"), "kl": ("forward_kl", "response"), "visual": ("forward_kl", "visual")}
    terms = [make_term(name, kind, Schedule(1.0, 0.5), positions) for name, (kind, positions) in kinds.items()]
    samples = tiny_samples(tmp_path, 3)
    dataset = PairDataset(samples, student, teacher, terms)
    batch = Collator(student, teacher)([dataset[i] for i in range(3)])["batch"]
    found = []
    for compiled in (False, True):
        distiller = Distiller(student, teacher, terms, chunk_bytes=2**16, compiled=compiled)
        distiller.zero_grad()
        loss, _ = distiller(batch, progress=0.3)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])))
    close(found[1][0], found[0][0], 1e-6)
    close(found[1][1], found[0][1], 1e-5)

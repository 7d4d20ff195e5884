#!/usr/bin/env python3
"""Race the row engine against naive code: time, peak memory and gradient error of logit losses.

    python scripts/bench/loss.py --preset small
    python scripts/bench/loss.py --preset large --losses kl --heads frozen --json loss.json
    python scripts/bench/loss.py --preset small --width 64 --teacher-width 64 --chunk-mib 0.5 --growth 1 64 8192

Methods: `naive-all` makes the logits of all positions and masks the loss (what most trainers do),
`naive-rows` gathers the response rows first, `mmkd` is `mmkd.engine.rows.row_losses` on those rows, `mmkd-compiled`
the same with `compiled=True` (the compilation is left out of time and memory). Where
they are installed and have the loss, also on those rows: `trl` (ChunkedDivergenceFunction), `liger`
(LigerFusedLinearJSDLoss; its JSD of 0.5, and 0 and 1 for the KLs) and `torchtune` (its chunked losses; their
value lacks the teacher's entropy). `mdist` is forward KL on all positions, as on 576 visual tokens. The
forward and backward pass are timed together. Every measurement is a fresh process; the methods take turns,
and the median over repeats is printed.

Peak memory is what the first pass takes above the start: resident memory on a CPU (the kernel's high-water
mark where it can be reset, else sampled), `max_memory_allocated` on CUDA. A trained head's own gradient `[V,
D]` is part of it. The gradient error is the relative 2-norm error of the hidden rows' gradient against
float64, on the first rows.

`--growth` shows instead how the peak memory of `mmkd` depends on the number of rows: what the allocator had given out at most,
to the byte (so without the workspace of the libraries), and the part of it that must grow: the gathered hidden rows of both
models, the float32 gradient of the student's, and a value a row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {
    "tiny": dict(positions=64, rows=8, vocabulary=2000, width=32, teacher_width=64),
    "small": dict(positions=512, rows=64, vocabulary=32000, width=512, teacher_width=1024),
    "large": dict(positions=512, rows=64, vocabulary=151936, width=896, teacher_width=2048),
    "huge": dict(positions=8192, rows=8192, vocabulary=151936, width=896, teacher_width=3584),
}
LOSSES = ("kl", "reverse_kl", "jsd", "dbild", "ce+kl", "mdist")
HEADS = ("frozen", "trained")
METHODS = ("naive-all", "naive-rows", "mmkd", "mmkd-compiled", "trl", "liger", "torchtune")
BETAS = {"kl": 0.0, "mdist": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
NOT_OFFERED = {("torchtune", "jsd")}  # its symmetric KL is another loss
PEERS = {"trl": "trl", "liger": "liger_kernel", "torchtune": "torchtune"}  # method -> package
CHECKED_ROWS = 4


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return
    if options.growth:
        show_growth(options)
        return
    absent = [m for m in options.methods if m in PEERS and not find_spec(PEERS[m])]
    for method in absent:
        print(f"{method} is left out: the package {PEERS[method]} is not installed here", file=sys.stderr)
    methods = [m for m in options.methods if m not in absent]
    cases = [
        case(options, m, x, h)
        for h in options.heads
        for x in options.losses
        for m in methods
        if (m not in PEERS or x in BETAS) and (m, x) not in NOT_OFFERED
    ]
    results = [[] for _ in cases]
    for _ in range(options.repeats):
        for found, one in zip(results, cases, strict=False):
            found.append(run_fresh(one))
            print(json.dumps(summary(one, found)), file=sys.stderr, flush=True)  # of what was measured so far
    table = [summary(one, found) for one, found in zip(cases, results, strict=False)]
    show(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"settings": cases[0], "results": table}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for name in PRESETS["tiny"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="override the preset")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each case")
    parser.add_argument("--timed", type=int, default=3, help="timed passes in each process, after the first")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--chunk-mib", type=float, default=256, help="byte budget of the row engine")
    parser.add_argument("--growth", type=int, nargs="+", metavar="ROWS", help="peak memory of mmkd at these numbers of rows")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: own time, on a busy machine")
    parser.add_argument("--json", help="write settings and results here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def case(options, method: str, loss: str, head: str) -> dict:
    sizes = {k: getattr(options, k) or v for k, v in PRESETS[options.preset].items()}
    if loss == "mdist":
        sizes["rows"] = sizes["positions"]
    keep = ("device", "dtype", "threads", "timed", "chunk_mib", "clock")
    return {**sizes, **{k: getattr(options, k) for k in keep}, "method": method, "loss": loss, "head": head}


def run_fresh(one: dict) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(one)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode != 0:
        raise SystemExit(f"{one['method']} {one['loss']} {one['head']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(one: dict, found: list[dict]) -> dict:
    seconds = [s for f in found for s in f["seconds"]]
    return {
        **{k: one[k] for k in ("method", "loss", "head")},
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_mib": statistics.median(f["peak_mib"] for f in found),
        "gradient_error": max(f["gradient_error"] for f in found),
        "value": found[0]["value"],
        **{k: found[0][k] for k in ("device_name", "torch", "torch_threads")},
    }


def show(table: list[dict]) -> None:
    first = table[0]
    print(f"device {first['device_name']}, torch {first['torch']}, {first['torch_threads']} threads")
    columns = f"{'loss':<11}{'head':<9}{'method':<12}{'ms':>10}{'(min - max)':>20}"
    print(columns + f"{'peak MiB':>10}{'grad error':>12}")
    for row in table:
        low, high = (1000 * s for s in row["seconds_range"])
        print(
            f"{row['loss']:<11}{row['head']:<9}{row['method']:<12}{1000 * row['seconds']:>10.1f}"
            f"{f'({low:.1f} - {high:.1f})':>20}{row['peak_mib']:>10.0f}{row['gradient_error']:>12.1e}"
        )


# ---- growth with the rows ----


def show_growth(options) -> None:
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = []
    print(f"{'loss':<11}{'rows':>6}{'peak bytes':>14}{'must grow':>12}{'the rest':>12}")
    for loss in options.losses:
        for rows in options.growth:
            one = case(options, "mmkd", loss, "frozen") | {"positions": rows, "rows": rows}
            ours(case_of_two_rows(one), make_inputs(case_of_two_rows(one), device))
            peak = allocated(one, make_inputs(one, device), device)
            size = getattr(torch, one["dtype"]).itemsize
            values = 2 if loss == "ce+kl" else 1
            stored = rows * (size * (one["width"] + one["teacher_width"]) + 4 * (one["width"] + values))
            found.append({"loss": loss, "rows": rows, "peak": peak, "must_grow": stored})
            print(f"{loss:<11}{rows:>6}{peak:>14,}{stored:>12,}{peak - stored:>12,}", flush=True)
    if options.json:
        settings = case(options, "mmkd", options.losses[0], "frozen")
        Path(options.json).write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")


def allocated(one: dict, data: dict, device) -> int:
    """Most bytes given out at once while the loss and its gradient are computed, beyond the inputs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        with Peak(device) as peak:
            ours(one, data)
        return round(peak.mib * 2**20)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        ours(one, data)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(sizes.cumsum(0).max())


# ---- one measurement, in a process of its own ----


def measure(one: dict) -> dict:
    import torch

    if one["threads"]:
        torch.set_num_threads(one["threads"])
    device = torch.device(one["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = make_inputs(one, device)
    steps = {"naive-all": naive_all, "naive-rows": naive_rows, "mmkd": ours, "mmkd-compiled": ours}
    steps |= {"trl": trl, "liger": liger, "torchtune": torchtune}
    step = steps[one["method"]]
    step(case_of_two_rows(one), make_inputs(case_of_two_rows(one), device))  # imports and threads are not part of a pass
    if one["method"] == "mmkd-compiled":  # nor is compiling, which goes by the vocabulary
        step(one, data)
        data["hs"].grad = data["ws"].grad = None
    with Peak(device) as peak:
        value = step(one, data)
        synchronize(device)
    error = gradient_error(one, data)
    seconds = []
    clock = time.process_time if one["clock"] == "cpu" else time.perf_counter
    for _ in range(one["timed"]):
        data["hs"].grad = data["ws"].grad = None
        synchronize(device)
        start = clock()
        step(one, data)
        synchronize(device)
        seconds.append(clock() - start)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "seconds": seconds,
        "peak_mib": peak.mib,
        "gradient_error": error,
        "value": value,
        "device_name": name,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def make_inputs(one: dict, device) -> dict:
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, one["dtype"])
    n, v = one["positions"], one["vocabulary"]

    def normal(*shape, scale):
        return torch.randn(*shape, device=device, dtype=dtype).mul_(scale)

    # Logits of standard deviation 2, shared in part, so that teacher and student are not strangers.
    data = {
        "hs": normal(n, one["width"], scale=1).requires_grad_(),
        "ht": normal(n, one["teacher_width"], scale=1),
        "ws": normal(v, one["width"], scale=2 / one["width"] ** 0.5),
        "wt": normal(v, one["teacher_width"], scale=2 / one["teacher_width"] ** 0.5),
        "targets": torch.randint(0, v, (n,), device=device),
        "response": torch.arange(n, device=device) >= n - one["rows"],
    }
    data["ws"].requires_grad_(one["head"] == "trained")
    return data


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def naive_all(one: dict, data: dict) -> float:
    import torch

    student = (data["hs"] @ data["ws"].T).float()  # [N, V]
    with torch.no_grad():
        teacher = (data["ht"] @ data["wt"].T).float()  # [N, V]
    losses = naive_loss(one["loss"], student, teacher, data["targets"])  # [N]
    total = (losses * data["response"]).sum() / one["rows"]
    total.backward()
    return total.item()


def naive_rows(one: dict, data: dict) -> float:
    import torch

    keep = data["response"]
    student = (data["hs"][keep] @ data["ws"].T).float()  # [R, V]
    with torch.no_grad():
        teacher = (data["ht"][keep] @ data["wt"].T).float()  # [R, V]
    total = naive_loss(one["loss"], student, teacher, data["targets"][keep]).sum() / one["rows"]
    total.backward()
    return total.item()


def ours(one: dict, data: dict) -> float:
    from mmkd.engine.rows import Head, RowTerm, row_losses
    from mmkd.losses import JSD, CrossEntropy, DBiLD, ForwardKL, ReverseKL

    known = {
        "kl": [("kl", ForwardKL(), True)],
        "mdist": [("mdist", ForwardKL(), True)],
        "reverse_kl": [("reverse_kl", ReverseKL(), True)],
        "jsd": [("jsd", JSD(0.5), True)],
        "dbild": [("dbild", DBiLD(), True)],
        "ce+kl": [("ce", CrossEntropy(), False), ("kl", ForwardKL(), True)],
    }
    keep = data["response"]
    total, _ = row_losses(
        data["hs"][keep],
        Head(data["ws"]),
        data["targets"][keep],
        [RowTerm(name, 1.0, loss, teacher) for name, loss, teacher in known[one["loss"]]],
        teacher_hidden=data["ht"][keep],
        teacher_head=Head(data["wt"]),
        chunk_bytes=int(one["chunk_mib"] * 2**20),
        compiled=one["method"] == "mmkd-compiled",
    )
    total = total / one["rows"]
    total.backward()
    return total.item()


def case_of_two_rows(one: dict) -> dict:
    return {**one, "positions": 4, "rows": 2, "vocabulary": 64, "width": 8, "teacher_width": 8}


def trl(one: dict, data: dict) -> float:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    keep, beta = data["response"], BETAS[one["loss"]]
    values, _ = ChunkedDivergenceFunction.apply(data["hs"][keep], data["ws"], None, data["ht"][keep], data["wt"], None, beta)
    total = values.sum() / one["rows"]
    total.backward()
    return total.item()


def liger(one: dict, data: dict) -> float:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    keep, on_gpu = data["response"], data["hs"].is_cuda
    weights = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": BETAS[one["loss"]]}
    loss = LigerFusedLinearJSDLoss(**weights, temperature=1.0, compiled=on_gpu, chunk_size=1024)
    total = loss(data["hs"][keep], data["ws"], data["ht"][keep], data["wt"], data["targets"][keep])
    total.backward()
    return total.item()


def torchtune(one: dict, data: dict) -> float:
    import torch
    from torchtune.modules import loss as losses

    classes = {
        "kl": losses.ForwardKLWithChunkedOutputLoss,
        "mdist": losses.ForwardKLWithChunkedOutputLoss,
        "reverse_kl": losses.ReverseKLWithChunkedOutputLoss,
    }
    keep, chunks = data["response"], 8
    student = [h @ data["ws"].T for h in data["hs"][keep].unsqueeze(0).chunk(chunks, 1)]
    with torch.no_grad():
        teacher = [h @ data["wt"].T for h in data["ht"][keep].unsqueeze(0).chunk(chunks, 1)]
    total = classes[one["loss"]](num_output_chunks=chunks)(student, teacher, data["targets"][keep].unsqueeze(0))
    total.backward()
    return total.item()


def naive_loss(loss: str, student, teacher, targets):
    """The textbook formula on whole logits `[R, V]`; also the float64 reference, and free of mmkd's code."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    if loss == "dbild":
        return naive_dbild(student, teacher)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if loss in ("kl", "mdist"):
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if loss == "reverse_kl":
        return kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if loss == "jsd":
        log_m = torch.logsumexp(torch.stack([log_q, log_p]), 0) - torch.tensor(2.0).log()
        forward = kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
        return (forward + kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)) / 2
    ce = cross_entropy(student, targets, reduction="none")
    return ce + kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def naive_dbild(student, teacher, temperature=3.0, window=64, min_k=4):
    return sum(
        naive_branch(student, teacher, leader.detach().topk(window, -1), temperature, min_k)
        for leader in (teacher, student)
    )


def naive_branch(student, teacher, top, temperature, min_k):
    import torch

    s, size = top.values, top.values.shape[-1]
    x = torch.linspace(0, 1, size, device=s.device, dtype=s.dtype)
    k = ((1 - x) - (s - s[:, -1:]) / (s[:, :1] - s[:, -1:])).argmax(-1).add(1).clamp(min=min_k)  # [R]
    i, j = torch.triu_indices(size, size, 1, device=s.device)  # [P] all pairs
    unused = j >= k.unsqueeze(-1)  # [R, P]

    def log_pairs(z):
        z = z.gather(-1, top.indices) / temperature
        return (z[:, i] - z[:, j]).masked_fill(unused, -torch.inf).log_softmax(-1)

    log_q, log_p = log_pairs(student), log_pairs(teacher)  # [R, P]
    return (log_q.exp() * (log_q.masked_fill(unused, 0) - log_p.masked_fill(unused, 0))).sum(-1)


def gradient_error(one: dict, data: dict) -> float:
    """Relative 2-norm error of the gradient of the first response rows, against float64 maths on the same
    inputs."""
    import torch

    rows = data["response"].nonzero().squeeze(-1)[:CHECKED_ROWS]
    hs, ht = data["hs"].detach()[rows].double(), data["ht"][rows].double()
    tiles = range(0, one["vocabulary"], 8192)  # a float64 copy of a whole head would not fit beside the rest
    ws, wt = data["ws"].detach(), data["wt"]
    student = torch.cat([hs @ ws[t : t + 8192].double().T for t in tiles], -1).requires_grad_()
    teacher = torch.cat([ht @ wt[t : t + 8192].double().T for t in tiles], -1)
    total = naive_loss(one["loss"], student, teacher, data["targets"][rows]).sum() / one["rows"]
    (g,) = torch.autograd.grad(total, student)
    exact = sum(g[:, t : t + 8192] @ ws[t : t + 8192].double() for t in tiles)
    found = data["hs"].grad[rows].double()
    return ((found - exact).norm() / exact.norm()).item()


class Peak:
    """Peak memory above the start, in MiB."""

    def __init__(self, device):
        self.device, self.mib = device, 0.0

    def __enter__(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.start = self.highest = resident()
        self.exact = reset_high_water()
        if not self.exact:
            self.running = True
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_):
        import torch

        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
            return
        if self.exact:
            self.highest = high_water()
        else:
            self.running = False
            self.thread.join()
        self.mib = (self.highest - self.start) / 2**20

    def _sample(self):
        while self.running:
            self.highest = max(self.highest, resident())
            time.sleep(0.002)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_high_water() -> bool:
    """Whether the kernel let us set the high-water mark back to the present (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return high_water() < resident() + 8 * 2**20
    except (OSError, StopIteration):
        return False


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time what communication adds to a distillation step of several processes.

    python scripts/bench/scale.py --preset scaled --rounds 15
    python scripts/bench/scale.py --engine fsdp2 --processes 2 --json runs/bench/scale.json
    DS_ACCELERATOR=cpu python scripts/bench/scale.py --engine zero3        (pip install deepspeed)

Every process takes its share of a batch (teacher's pass, student's forward and backward pass, AdamW) in two ways, which take
turns: `alone`, without a word to the others, and `together`, with the counts and the gradients (FSDP2, ZeRO: weights too)
exchanged. For FSDP2 a third way, `engine`, has each process shard among itself alone: what FSDP2 does beside communication. All
ways keep all processes busy at once and start together, so their ratios are the price of communication and of waiting for one
another's gradients. A round's time is that of its slowest process; medians over rounds. Gloo on CPUs, NCCL on GPUs. On CPUs a
few profiled steps also give the time between the start and the end of each exchange, in the process where it was
shortest: the one that came last waits for nobody. Exchanges that overlap count once.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from step import CASES, PRESETS, batch_of, term, tower  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from mmkd.base.distributed import end_process  # noqa: E402
from mmkd.train.batch import Batch  # noqa: E402
from mmkd.train.distiller import Distiller  # noqa: E402

ENGINES = ("ddp", "fsdp2", "fsdp2_kept", "zero2", "zero3")
PROFILED = 5  # steps whose exchanges are timed


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        work(options)
        end_process(0)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    environment = {"OMP_NUM_THREADS": str(options.threads)} | dict(os.environ)
    sys.exit(subprocess.run([*launch, __file__, *sys.argv[1:]], env=environment).returncode)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="scaled")
    parser.add_argument("--case", choices=CASES, default="kl")
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", help="write settings and results here")
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """What each process does."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    sizes = PRESETS[options.preset]
    if sizes["batch"] % options.processes:
        raise SystemExit(f"{options.processes} processes cannot share a batch of {sizes['batch']}")
    share = sizes | {"batch": sizes["batch"] // options.processes}
    teacher, student = (tower(sizes, role, device, options.dtype) for role in ("teacher", "student"))
    terms = [term(kind, positions) for kind, positions in CASES[options.case]]
    batch = batch_of(share, student, teacher, sorted({t.positions for t in terms}))[0].to(device)
    alone = Distiller(student, teacher, terms).train()
    freeze_idle(alone, batch)
    together = Distiller(copy.deepcopy(student), teacher, terms).train()
    make = deepspeed_stepper if options.engine.startswith("zero") else wrapped_stepper
    runs = {"alone": stepper(alone, batch, 1), "together": make(options, together, batch)}
    if options.engine.startswith("fsdp2"):
        among_itself = Distiller(copy.deepcopy(student), teacher, terms).train()
        runs["engine"] = stepper(sharded(options, among_itself, own_mesh(device)), batch, 1)
    seconds = race(runs, options.rounds, device)
    exchanged = exchanges(runs["together"]) if device.type == "cpu" else []
    if dist.get_rank() == 0:
        report(options, share, alone, seconds, exchanged)
    dist.barrier()
    dist.destroy_process_group()


def freeze_idle(model: Distiller, batch: Batch) -> None:
    """Parameters that no term reaches, which the others would wait for; `mmkd distill` freezes them too."""
    model(batch)[0].backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)


def wrapped_stepper(options: argparse.Namespace, model: Distiller, batch: Batch) -> Callable[[], None]:
    """As accelerate wraps it with scripts/launch/ddp.yaml, fsdp2.yaml or fsdp2_kept.yaml."""
    if options.engine == "ddp":
        return stepper(DistributedDataParallel(model), batch, options.processes)
    return stepper(sharded(options, model, None), batch, options.processes)


def sharded(options: argparse.Namespace, model: Distiller, mesh: DeviceMesh | None) -> Distiller:
    """FSDP2 over the processes of a mesh, or all."""
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mesh=mesh, reshard_after_forward=options.engine == "fsdp2")
    return fully_shard(model, mesh=mesh)


def own_mesh(device: torch.device) -> DeviceMesh:
    """This process alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]  # every process makes all of them
    return DeviceMesh.from_group(groups[dist.get_rank()], device.type)


def deepspeed_stepper(options: argparse.Namespace, model: Distiller, batch: Batch) -> Callable[[], None]:
    """As scripts/launch/zero2.yaml or zero3.yaml have it."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(options.engine[-1])},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.dtype == "bfloat16"},
    }
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    engine = deepspeed.initialize(model=model, optimizer=optimiser, config=config)[0]

    def step() -> None:
        counts = batch.counts.clone()
        dist.all_reduce(counts)
        loss, _ = engine(batch, counts)
        engine.backward(loss * options.processes)
        engine.step()

    return step


def stepper(model: torch.nn.Module, batch: Batch, processes: int) -> Callable[[], None]:
    """A whole optimiser step, with the counts of all processes added up where there are several."""
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        counts = batch.counts.clone()
        if processes > 1:
            dist.all_reduce(counts)
        loss, _ = model(batch, counts)
        (loss * processes).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def race(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round by its slowest process; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            dist.barrier()
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number:
                seconds[name].append(float(taken))
    return seconds


def exchanges(step: Callable[[], None]) -> list[tuple[int, float, float]]:
    """Of each profiled step: how many exchanges, the seconds that they took, and those with the waiting of this process."""
    found = []
    for _ in range(PROFILED):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        exchanged = [e for e in recorded.events() if e.name.startswith("gloo:")]
        spans = sorted((e.time_range.start / 1e6, e.time_range.end / 1e6) for e in exchanged)
        own, free = [], 0.0
        for start, end in spans:
            own.append(max(0.0, end - max(start, free)))
            free = max(free, end)
        shortest = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(shortest, op=dist.ReduceOp.MIN)  # every process has the same exchanges in one order
        found.append((len(own), float(shortest.sum()), sum(own)))
    return found


def report(
    options: argparse.Namespace,
    share: dict,
    model: Distiller,
    seconds: dict[str, list[float]],
    exchanged: list[tuple[int, float, float]],
) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {
        "settings": {**vars(options), **share, "torch": torch.__version__},
        "gradient_mib": sum(p.numel() * p.element_size() for p in trained) / 2**20,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "range": {name: [min(times), max(times)] for name, times in seconds.items()},
    }
    # Of neighbours in time, so that what else the machine does cancels out.
    ratios = [b / a for a, b in zip(seconds["alone"], seconds["together"], strict=True)]
    found["together / alone"] = found["seconds"]["together"] / found["seconds"]["alone"]
    found["median ratio"] = statistics.median(ratios)
    about = f"{options.engine}, {options.processes} processes, {share['batch']} samples each"
    print(f"{about}, {found['gradient_mib']:.1f} MiB of gradients")
    for name, times in seconds.items():
        print(f"{name:<10}{1000 * statistics.median(times):>9.1f} ms  ({1000 * min(times):.1f} - {1000 * max(times):.1f})")
    print(f"together / alone: {found['together / alone']:.3f}; median of rounds {found['median ratio']:.3f}")
    if "engine" in seconds:
        beyond = [b / a for a, b in zip(seconds["engine"], seconds["together"], strict=True)]
        found["together / engine"] = found["seconds"]["together"] / found["seconds"]["engine"]
        print(f"together / engine: {found['together / engine']:.3f}; median of rounds {statistics.median(beyond):.3f}")
    if exchanged:
        number, pure, waited = (statistics.median(column) for column in zip(*exchanged, strict=True))
        part = pure / found["seconds"]["together"]
        found |= {"exchanges": {"number": number, "seconds": pure, "with waiting": waited, "of the step": part}}
        spread = f"{1000 * min(p for _, p, _ in exchanged):.1f} - {1000 * max(p for _, p, _ in exchanged):.1f}"
        print(f"{number:.0f} exchanges: {1000 * pure:.1f} ms ({spread}), {part:.1%} of the step")
        print(f"with waiting {1000 * waited:.1f} ms")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

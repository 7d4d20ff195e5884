#!/usr/bin/env python3
"""What a teacher cache costs and gives: writing, opening, reading a batch, bytes a row against the forecast.

    python scripts/bench/cache.py --samples 2000 --rows 64 --width 3584

Entries of random hidden rows in bfloat16, or of top-k; no model is run. `reading` is a batch of random samples through the memory
map, with the file cache as it is: warm if the set fits the memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from mmkd.teachers.store import About, ShardWriter, StoredRows, TeacherCache  # noqa: E402

BATCH = 32


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = [race(options, Path(folder) / str(top_k), top_k) for top_k in (0, *options.top_k)]
    show(table)
    if options.json:
        Path(options.json).write_text(json.dumps({"settings": vars(options), "results": table}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=64, help="of a sample")
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--top-k", type=int, nargs="*", default=[64, 16])
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--folder", default=None, help="a folder on the disk that is measured")
    parser.add_argument("--json", help="write settings and results here")
    return parser.parse_args()


def race(options: argparse.Namespace, folder: Path, top_k: int) -> dict:
    nobody = {"model": "", "files": {}, "fingerprint": "", "dtype": "", "quantise": None, "max_length": 0, "precision": ""}
    About(**nobody, top_k=top_k or None, rows=["response"], features=False, logit_rule=[1.0, None], vocabulary=0, body={}).save(
        folder
    )
    stored = entry(options, top_k)
    writer = ShardWriter(folder)
    started = time.perf_counter()
    for number in range(options.samples):
        writer.add(key(number), key(number), stored)
    writer.close()
    writing = time.perf_counter() - started
    started = time.perf_counter()
    cache = TeacherCache(folder)
    opening = time.perf_counter() - started
    draw, seconds = random.Random(0), []
    for _ in range(options.batches):
        numbers = [draw.randrange(options.samples) for _ in range(BATCH)]
        started = time.perf_counter()
        batch = StoredRows.join([cache.entry(key(number), ["response"]) for number in numbers])
        sum(float(tensor.float().sum()) for tensor in batch.signal.values())  # every page is touched
        seconds.append(time.perf_counter() - started)
    forecast = 1 + 4 + 4 + sum(t[0].numel() * t.element_size() for t in stored.signal.values()) + (2 * 16 + 3 * 8) / options.rows
    return {
        "mode": f"top-{top_k}" if top_k else "exact",
        "bytes a row": writer.bytes / writer.rows,
        "forecast": forecast,
        "writing MiB/s": writer.bytes / 2**20 / writing,
        "opening ms": 1000 * opening,
        "reading ms a batch": 1000 * statistics.median(seconds),
    }


def entry(options: argparse.Namespace, top_k: int) -> StoredRows:
    n = options.rows
    if top_k:
        ids, log_probs = torch.zeros(n, top_k, dtype=torch.int32), torch.zeros(n, top_k).half()
        signal = {"ids": ids, "log_probs": log_probs, "tail": torch.zeros(n)}
    else:
        signal = {"hidden": torch.randn(n, options.width).bfloat16()}
    return StoredRows(torch.ones(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.int32), torch.zeros(n), signal, [])


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def show(table: list[dict]) -> None:
    print("".join(f"{name:>20}" for name in table[0]))
    for row in table:
        print("".join(f"{value:>20}" if isinstance(value, str) else f"{value:>20,.2f}" for value in row.values()))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Damaged and hostile inputs, in one process: recipes, overrides, cards, annotations, pictures, archives, models, runs, caches.

    python scripts/attack/fuzz.py                                 a short round of each kind
    python scripts/attack/fuzz.py --cases 1500 --seed 7 --json found.json

A case is wrong where it ends in anything but success or one of mmkd's own errors, takes more than 5 s of the processor or 30 by
the clock, adds more than 1 GiB to the process, says more than 20 lines, or reads a picture from outside its root. A cache or
checkpoint that was damaged is wrong where it is read without a word and gives other values. Each wrong case can be made again by
its kind and seed: --kinds KIND --seed SEED --cases 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

from mmkd.errors import MmkdError  # noqa: E402

SECONDS, BYTES, LINES = 5.0, 2**30, 20
PATIENCE = 6  # times SECONDS by the clock, since other programs may have the processor
SECRET = (7, 7)  # size of the only picture that lies outside of all roots


class Hang(BaseException):
    pass


class Wrong(Exception):
    """What a target found by itself."""


class Bench:
    """Small inputs that are whole, made once; every case works on a copy of its own."""

    def __init__(self, folder: Path):
        from targets import TARGETS, make_whole

        self.folder, self.targets = folder, TARGETS
        self.whole = make_whole(folder / "whole")

    def run(self, kind: str, seed: int) -> dict[str, Any] | None:
        """What was wrong with one case, or None."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        draw = random.Random(f"{kind} {seed}")
        said: dict[str, Any] = {"kind": kind, "seed": seed}
        reset_peak()
        before, began = memory("VmRSS"), time.thread_time()
        text = io.StringIO()
        try:
            with within(PATIENCE * SECONDS), contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                said["damage"] = self.targets[kind](draw, self.whole, place)
        except MmkdError as error:
            if len(str(error).splitlines()) > LINES or len(str(error)) > 20_000:
                return said | {"wrong": f"a message of {len(str(error).splitlines())} lines", "text": str(error)[:300]}
        except Wrong as error:
            return said | {"wrong": str(error)}
        except Hang:
            return said | {"wrong": "hangs", "text": ""}
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)
            own = [f"{Path(f.filename).name}:{f.lineno}" for f in place if "/mmkd/" in f.filename][-2:]
            return said | {"wrong": f"{type(error).__name__}: {str(error)[:200]}", "text": " ".join(own)}
        if "Traceback" in text.getvalue():
            return said | {"wrong": "a traceback", "text": text.getvalue()[-600:]}
        if memory("VmHWM") - before > BYTES:
            return said | {"wrong": f"{(memory('VmHWM') - before) / 2**20:,.0f} MiB more"}
        if time.thread_time() - began > SECONDS:
            return said | {"wrong": f"takes {time.thread_time() - began:.1f} s"}
        return None


@contextlib.contextmanager
def within(seconds: float):
    def stop(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(name: str) -> int:
    """Bytes of this process, from Linux."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), 0)


def reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def fuzz(kinds: list[str], cases: int, seed: int, show: Callable[[str], object] = print) -> dict[str, Any]:
    """{kind: {"cases", "seconds", "wrong": [...]}}"""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            for kind in kinds or list(bench.targets):
                began, wrong = time.monotonic(), []
                for number in range(seed, seed + cases):
                    if (one := bench.run(kind, number)) is not None:
                        wrong.append(one)
                        show(json.dumps(one))
                found[kind] = {"cases": cases, "seconds": round(time.monotonic() - began, 1), "wrong": wrong}
                show(f"{kind:<12} {cases:>6} cases {found[kind]['seconds']:>8} s {len(wrong):>5} wrong")
    finally:
        logging.disable(logging.NOTSET)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=[], help="default: all")
    parser.add_argument("--cases", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count on")
    parser.add_argument("--json", help="write what was found here")
    options = parser.parse_args()
    found = fuzz(options.kinds, options.cases, options.seed)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(kind["wrong"] for kind in found.values()))


if __name__ == "__main__":
    sys.exit(main())

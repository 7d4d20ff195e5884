#!/usr/bin/env python3
"""Kills commands at random moments, starts them again, and compares what they leave with an undisturbed run, bit by bit.

    python scripts/attack/kill.py --kills 3                       a few kills of each command
    python scripts/attack/kill.py --commands distill cache --kills 50 --seed 1 --json kills.json

Each round starts the command in a fresh folder, kills it (SIGKILL; every fifth time SIGTERM) at moments drawn over the time that
the undisturbed run took, from once to three times, and then lets it end. Wrong is: a command that fails when it is started again,
and weights, predictions or cache entries that differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def inputs(folder: Path) -> Path:
    """Tiny towers, data and recipes: two stages with a control, preference pairs, a ranking."""
    import yaml
    from targets import SIZES, VISION, picture, recipe, tower

    data = folder / "data"
    (data / "images").mkdir(parents=True)
    rows, pairs, captions = [], [], []
    words = ("red", "green", "blue", "round", "square")
    for number in range(24):
        picture(data / "images" / f"{number}.png", number)
        row = {"image": f"images/{number}.png", "question": f"what {'is ' * (number % 5)}{number}?", "answer": words[number % 5]}
        rows.append(row)
        pair = {"prompt": row["question"], "chosen": row["answer"], "rejected": words[(number + 1) % 5]}
        pairs.append({"image": row["image"], **pair})
        captions.append({"image": row["image"], "caption": f"{words[number % 5]} {words[number % 3]} {number}"})
    for name, lines in (("train", rows), ("test", rows[:6]), ("pairs", pairs), ("captions", captions)):
        numbered = [{"id": str(number), **line} for number, line in enumerate(lines)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbered))
    for seed, name in ((5, "teacher"), (6, "student")):
        tower(seed).save(folder / name)
    content = yaml.safe_load(recipe(folder, "distill.yaml", folder / "out").read_text())
    stage = content["stages"]["only"] | {"steps": 6, "save_every": 2}
    content |= {"control": True, "stages": {"first": stage, "second": {**stage, "train": ["projector", "language"]}}}
    (folder / "distill.yaml").write_text(yaml.safe_dump(content))
    spoken = {"adaptive": {"start": 0.5, "rise": 0.2, "tolerance": 1000, "every": 1, "capacity": 4, "max_new_tokens": 6}}
    own = {**stage, "answers": spoken, "terms": {"jsd": 1, "policy_gradient": 0.1}}
    (folder / "on_policy.yaml").write_text(yaml.safe_dump(content | {"control": False, "stages": {"only": own}}))
    write = {
        "kind": "write", "by": "teacher", "prompt": {"prompt": "{{ question }}"}, "data": stage["data"], "samples": 6,
        "temperature": 1.0, "max_new_tokens": 12, "keep_cut": True, "batch_size": 2, "checks": ["duplicates"],
    }  # fmt: skip
    written = {"write": write, "only": {**stage, "data": [{"from": "write"}]}}
    (folder / "write.yaml").write_text(yaml.safe_dump(content | {"control": False, "stages": written}, sort_keys=False))
    compared = {"format": "preference", "root": str(data), "files": {"annotations": "pairs.jsonl"}, "prompt": "plain"}
    pair = {**stage, "data": [compared], "terms": {"dpo": 1}}
    (folder / "preference.yaml").write_text(yaml.safe_dump(content | {"control": False, "stages": {"only": pair}}))
    names = {"annotations": "captions.jsonl", "field.question": "caption", "field.answer": "caption"}
    ranked = [{"format": "jsonl", "root": str(data), "files": names}]
    bert = {"model_type": "bert", **SIZES, "max_position_embeddings": 32}
    parts = {"vision": {"config": VISION}, "text": {"config": bert, "vocab_size": 300}, "embedding": 8}
    training = {"optimiser": {"batch_size": 4, "learning_rate": 1e-3}, "steps": 6, "save_every": 2, "log_every": 2}
    ranking = {
        "kind": "ranking", "title": "r", "output": str(folder / "out"), "data": ranked,
        "teacher": {"model": str(folder / "teacher"), "kind": "prompted", "batch_size": 8},
        "student": {"assemble": parts}, "training": training, "ranking": {"candidates": 3, "threshold": 0.0},
        "evaluation": {"data": ranked},
    }  # fmt: skip
    (folder / "rank.yaml").write_text(yaml.safe_dump(ranking))
    return folder


def commands(folder: Path, place: Path) -> dict[str, list[str]]:
    """By name the arguments of a command that writes below `place`."""
    out = f"output={place / 'out'}"
    return {
        "distill": ["distill", str(folder / "distill.yaml"), out],
        "on_policy": ["distill", str(folder / "on_policy.yaml"), out],
        "preference": ["distill", str(folder / "preference.yaml"), out],
        "write": ["write", str(folder / "write.yaml"), out],
        "cache": ["cache", str(folder / "distill.yaml"), f"teacher.cache={place / 'cache'}", "--batch-size", "5"],
        "evaluate": [
            "evaluate", str(folder / "student"), "--benchmarks", str(folder / "card.yaml"), "--output", str(place / "out"),
            "--batch-size", "1",
        ],
        "rank": ["rank", str(folder / "rank.yaml"), out],
    }  # fmt: skip


def left(place: Path) -> dict[str, Any]:
    """What a command left that must be the same: weights by file, predictions, written rows and answers, cache entries by key."""
    from mmkd.base.checksums import hash_of

    found: dict[str, Any] = {}
    for path in sorted(place.rglob("model.safetensors")):
        if not any(part.startswith(".") for part in path.relative_to(place).parts):
            found[str(path.relative_to(place))] = hash_of(path)
    for path in sorted(place.rglob("predictions.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(place))] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for path in sorted(place.glob("written/write-*/*.jsonl")):
        found[str(path.relative_to(place))] = path.read_text()
    for path in sorted(place.glob("written/answers/*/*.jsonl")):  # a torn line is no answer; one that was asked twice differs
        for row in map(json.loads, path.read_bytes().split(b"\n")[:-1]):
            found.setdefault(row["key"], []).append(row)
    if (place / "cache" / "cache.json").exists():
        from mmkd.teachers.shard_hashes import hash_of_tensors
        from mmkd.teachers.store import TeacherCache

        cache = TeacherCache(place / "cache")
        for key in (bytes.fromhex(text.decode()) for text in cache._keys):
            entry = cache.entry(key, ["response", "prompt", "visual"])
            found[key.hex()] = hash_of_tensors([entry.tokens, entry.scores, *entry.signal.values()]).hex()
    return found


class Child:
    """A command in a process of its own, forked from this one, which has imported everything but run nothing."""

    def __init__(self, arguments: list[str], log: Path):
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            code = 1
            try:
                from mmkd.cli import main

                code = main(arguments)
            except SystemExit as exit:
                code = int(exit.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self, seconds: float = 600.0) -> bool:
        """Whether it ended within this time."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.002)
        return True

    def end(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        self.wait()


def ready() -> None:
    """Imports what commands import, so that each of them starts at once."""
    import torch

    import mmkd.cli.cache
    import mmkd.cli.distill
    import mmkd.cli.evaluate
    import mmkd.cli.rank
    import mmkd.cli.write
    import mmkd.retrieval.run
    import mmkd.runs.evaluate
    import mmkd.runs.run
    import mmkd.runs.write_cache
    import mmkd.runs.writes  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork


def attack(name: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills one command until it was killed so often; {"kills", "rounds", "seconds", "wrong"}."""
    draw, wrong, done, rounds, began = random.Random(f"{name} {seed}"), [], 0, 0, time.monotonic()
    whole = folder / f"{name}_undisturbed"
    whole.mkdir()
    clock = time.monotonic()
    child = Child(commands(folder, whole)[name], whole / "log")
    child.wait()
    length, code = time.monotonic() - clock, child.code
    if code:
        return {"kills": 0, "wrong": [f"the undisturbed run ended with {code}: {(whole / 'log').read_text()[-800:]}"]}
    expected = left(whole)
    while done < kills:
        rounds += 1
        place = folder / f"{name}_killed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        moments = []
        for _ in range(draw.randint(1, 3)):
            child = Child(commands(folder, place)[name], place / "log")
            wait = draw.uniform(0.02, 1.0) * length
            if child.wait(wait):
                break
            number = signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL
            child.end(number)
            done += 1
            moments.append(f"{number.name} after {wait:.2f} s")
            if number == signal.SIGTERM and child.code not in (0, 143, -15):
                wrong.append({"round": rounds, "kills": moments, "wrong": f"SIGTERM gave {child.code}"})
        child = Child(commands(folder, place)[name], place / "log")
        child.wait()
        code = child.code
        found = left(place) if code == 0 else {}
        differing = sorted(key for key in expected if found.get(key) != expected[key])
        if code or differing:
            tail = (place / "log").read_text(errors="replace")[-600:] if code else ""
            facts = {"round": rounds, "kills": moments, "code": code, "differing": differing[:5], "tail": tail}
            wrong.append(facts)
    seconds = round(time.monotonic() - began)
    return {"kills": done, "rounds": rounds, "seconds": seconds, "compared": len(expected), "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="*", default=["cache", "write", "evaluate", "rank", "preference", "distill"])
    parser.add_argument("--kills", type=int, default=3, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write what was found here")
    options = parser.parse_args()
    results = {}
    ready()
    with tempfile.TemporaryDirectory() as folder:
        made = inputs(Path(folder))
        for name in options.commands:
            results[name] = attack(name, options.kills, options.seed, made)
            print(json.dumps({name: results[name]}, indent=1), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["wrong"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

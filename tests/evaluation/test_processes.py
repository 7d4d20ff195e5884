"""Several processes give the answers of one, also where they go on from another number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkd.cli import main
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.processes import Processes
from mmkd.evaluation.results import read_predictions
from mmkd.evaluation.store import PARTIAL
from tests.tiny import tiny_tower

CARD = "title: tiny\nformat: jsonl\nroot: tiny\nsplit: test\nprompt_style: plain\nmetric: exact_match\nmax_new_tokens: 5\n"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batches", [0, 1, 5, 100])
def test_every_batch_belongs_to_one_process(count: int, batches: int) -> None:
    shares = [Processes(index, count).share(range(batches)) for index in range(count)]
    assert sorted(batch for share in shares for batch in share) == list(range(batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= -(-batches // (8 * count))


def test_two_processes_go_on_where_one_stopped(data: Path, tmp_path: Path) -> None:
    tiny_tower().save(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(CARD, encoding="utf-8")
    command = ["evaluate", str(tmp_path / "model"), "--benchmarks", str(tmp_path / "tiny.yaml"), "--data-root", str(data)]
    command += ["--batch-size", "3"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    expected = read_predictions(tmp_path / "one" / "tiny" / "predictions.jsonl")
    assert len({row["prediction"] for row in expected.values()}) > 3

    rows = [{"id": name, "prediction": "kept", "skipped": None, "seconds": 0.5} for name in ("red-9", "green-9", "blue-9")]
    keys = ("benchmark", "model_fingerprint", "data_fingerprint", "max_new_tokens", "blind", "choices_by")
    results = json.loads((tmp_path / "one" / "tiny" / "results.json").read_text(encoding="utf-8"))
    lines = [json.dumps({"header": {key: results[key] for key in keys}}), *map(json.dumps, rows), '{"id": "torn']
    (tmp_path / "two" / "tiny").mkdir(parents=True)
    (tmp_path / "two" / "tiny" / "answers.partial.1.jsonl").write_text("\n".join(lines), encoding="utf-8")

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmkd.cli"]
    done = subprocess.run(
        [*launch, *command, "--output", str(tmp_path / "two")], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("32 questions") == 1
    found = read_predictions(tmp_path / "two" / "tiny" / "predictions.jsonl")
    kept = {row["id"] for row in rows}
    assert list(found) == list(expected)
    assert {found[name]["prediction"] for name in kept} == {"kept"}
    assert all(found[name] == expected[name] for name in expected if name not in kept)
    results = json.loads((tmp_path / "two" / "tiny" / "results.json").read_text(encoding="utf-8"))
    assert results["processes"] == 2 and results["seconds"] > 1.5
    assert list((tmp_path / "two" / "tiny").glob("answers.partial*")) == []


def test_one_process_goes_on_where_two_stopped(data: Path, tmp_path: Path, benchmark_of, fake_tower) -> None:
    options = {"data_root": data, "batch_size": 4, "progress": False}
    whole = fake_tower({"blue-3": "no"})
    evaluate(whole, benchmark_of(), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(fake_tower({"blue-3": "no"}, fail_at=5), benchmark_of(), tmp_path / "stopped", **options)
    header, *rows = (tmp_path / "stopped" / PARTIAL).read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in ((PARTIAL, rows[:8]), ("answers.partial.1.jsonl", rows[8:])):
        (tmp_path / "stopped" / name).write_text(header + "".join(part), encoding="utf-8")
    second = fake_tower({"blue-3": "no"})
    evaluate(second, benchmark_of(), tmp_path / "stopped", **options)
    assert second.batches == whole.batches[5:]
    names = [tmp_path / name / "predictions.jsonl" for name in ("stopped", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()

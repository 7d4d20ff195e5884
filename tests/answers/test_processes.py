"""Two processes train on the student's answers as one does."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_tower

from mmkd.cli import main
from mmkd.sample.sample_set import write_sample_set

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


SOURCES = {
    "student": {"student": {"share": 0.7, "max_new_tokens": 6}, "data": 0.3},
    # With so few steps and answers that are kept, about half of the student's answers come again.
    "adaptive": {"adaptive": {"start": 0.5, "rise": 0.2, "tolerance": 1000, "every": 1, "capacity": 3, "max_new_tokens": 6}},
}


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_are_one(tmp_path, source):
    write_sample_set(tmp_path / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(1, 16).save(tmp_path / "student")
    recipe = {
        "title": "on-policy", "output": "OUTPUT", "data_root": str(tmp_path / "sample"), "max_length": 256, "control": False,
        "teacher": {"self": "ema", "decay": 0.5, "prompt": "{prompt} {answer}"}, "student": {"model": str(tmp_path / "student")},
        "guards": {"pixels_matter": False},
        "stages": {
            "own": {
                "data": [{"card": "sample_textvqa"}], "steps": 4, "log_every": 2, "save_every": 2,
                "answers": SOURCES[source],
                "terms": {"jsd": 1, "cross_entropy": 0.1, "policy_gradient": 0.1},
                "optimiser": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2},
            }
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["distill", str(path), f"output={tmp_path / 'one'}"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmkd.cli"]
    launch += ["distill", str(path), f"output={tmp_path / 'two'}"]
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    logs = [[json.loads(x) for x in (tmp_path / n / "log" / "student.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for alone, spread in zip(*logs, strict=True):
        for key in ("generated_length", "generated_share", "generated_cut", "loss", "policy_gradient"):
            assert spread[key] == pytest.approx(alone[key], rel=1e-3), key
        assert spread.get("adaptive_recalled") == alone.get("adaptive_recalled") and spread.get("adaptive_share") == alone.get(
            "adaptive_share"
        )
    assert source == "student" or sum(row["adaptive_recalled"] for row in logs[0]) > 0

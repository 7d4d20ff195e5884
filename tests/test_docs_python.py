"""docs/python.md: every block runs as it stands, in order; and `import mmkd` is quick."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkd
from mmkd.registry import registry
from mmkd.sample.sample_set import write_sample_set

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PUBLIC = {"load_recipe", "distill", "evaluate", "compare", "Tower", "losses", "register", "__version__"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout's root with a small sample."""
    for folder in ("models", "scripts", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    write_sample_set(tmp_path / "runs" / "sample", sizes={"train": 12, "val": 2, "test": 12})
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    registry("metrics").remove("first_word")


def test_the_page_runs_from_top_to_bottom(checkout, capsys):
    assert len(BLOCKS) == 5
    names: dict = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"block {number}", "exec"), names)
    summary = names["summary"]
    assert set(summary["benchmarks"]) == {"sample_scienceqa", "sample_textvqa"}
    assert (checkout / summary["report"]).is_file() and (checkout / "runs/python/compared/report.html").is_file()
    assert names["results"]["sample_scienceqa"]["n"] == 40
    difference = names["found"]["benchmarks"]["sample_scienceqa"]["differences"]["small - teacher"]
    assert difference["ci95"][0] <= difference["difference"] <= difference["ci95"][1]
    assert names["hidden"].shape[:2] == names["inputs"].targets.shape and len(names["seen"].tokens) == 1
    assert torch.isfinite(names["student"].grad).all() and names["student"].grad.abs().sum() > 0
    assert names["first_word"] is registry("metrics")._objects["first_word"]
    assert "points over the best control" in capsys.readouterr().out


def test_the_public_names():
    assert set(mmkd.__all__) == PUBLIC
    for name in PUBLIC - {"__version__", "losses"}:
        assert f"mmkd.{name}" in PAGE and callable(getattr(mmkd, name)), name
    assert mmkd.losses.forward_kl and set(dir(mmkd)) >= PUBLIC
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        mmkd.distil  # noqa: B018


def test_import_is_quick():
    """Without anything heavy, and within 0.1 s of this process's own time."""
    script = (
        "import sys, time\nstart = time.process_time()\nimport mmkd\nspent = time.process_time() - start\n"
        "print(spent, sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'}))"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT) for _ in range(3)]
    seconds = []
    for run in runs:
        assert run.returncode == 0, run.stderr
        spent, _, loaded = run.stdout.partition(" ")
        assert loaded.strip() == "[]"
        seconds.append(float(spent))
    assert min(seconds) <= 0.1

"""The benches run: nothing else calls them, and what they measure moves."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
SMALL = {
    "cache": ["--samples", "8", "--rows", "2", "--width", "16", "--top-k", "4", "--batches", "1"],
    "estimate": ["--recipes", "live", "--scenes", "12"],
    "loss": ["--preset", "tiny", "--losses", "kl", "--heads", "frozen", "--methods", "mmkd", "--repeats", "1", "--timed", "1"],
    "run": ["--scenes", "12", "--steps", "2", "--rounds", "1", "--variants", "kept"],
    "step": ["--preset", "tiny", "--rounds", "1", "--cases", "kl", "--threads", "1"],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_bench_writes_what_it_measures(name, tmp_path, monkeypatch):
    more = ["--folder", str(tmp_path)] if name == "cache" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL[name], *more, "--json", str(tmp_path / "found.json")])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    try:
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
    assert json.loads((tmp_path / "found.json").read_text())

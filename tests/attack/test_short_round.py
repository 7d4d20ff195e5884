"""A short round of every attack; the long ones: `fuzz.py --cases 1500`, `kill.py --kills 50`."""

import subprocess
import sys
from pathlib import Path

import pytest

ATTACK = Path(__file__).resolve().parents[2] / "scripts" / "attack"
sys.path.insert(0, str(ATTACK))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    import fuzz

    return fuzz.Bench(tmp_path_factory.mktemp("attack"))


CASES = {
    "recipes": 40, "overrides": 60, "cards": 60, "annotations": 40, "pictures": 40, "archives": 20, "models": 12, "runs": 4,
    "resumes": 2, "caches": 20, "checkpoints": 20,
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_short_round_finds_nothing(bench, kind):
    assert kind in bench.targets
    wrong = [found for seed in range(CASES[kind]) if (found := bench.run(kind, seed)) is not None]
    assert not wrong, wrong[:3]


def test_every_target_has_a_round(bench):
    assert set(bench.targets) == set(CASES)


def test_the_bench_tells_what_is_wrong(bench, monkeypatch):
    """A target that fails, hangs, floods or takes memory is told as such: the rounds above can fail."""
    import time

    from mmkd.errors import DataError

    def fails(draw, whole, place):
        raise KeyError("x")

    def hangs(draw, whole, place):
        time.sleep(30)

    def floods(draw, whole, place):
        raise DataError("\n".join("x" * 30))

    def takes(draw, whole, place):
        return str(len(bytearray(3 * 2**29)))

    def refuses(draw, whole, place):
        raise DataError("no")

    import fuzz

    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    said = {}
    for target in (fails, hangs, floods, takes, refuses):
        monkeypatch.setitem(bench.targets, "tried", target)
        said[target.__name__] = (bench.run("tried", 0) or {}).get("wrong", "")
    assert said["fails"].startswith("KeyError") and said["hangs"] == "hangs" and "30 lines" in said["floods"]
    assert "MiB more" in said["takes"] or said["takes"] == "hangs"
    assert said["refuses"] == ""


def test_one_kill_of_the_cache_changes_nothing(tmp_path):
    command = [sys.executable, str(ATTACK / "kill.py"), "--commands", "cache", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

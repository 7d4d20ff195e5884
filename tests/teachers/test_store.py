"""What a cache says of its teacher's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json
from mmkd.teachers.store import teacher_files

print(json.dumps([teacher_files(name) for name in ("someone/small", "someone/else", "no name?")]))
"""


def test_a_hub_model_is_known_by_its_commit(tmp_path):
    """In the hub's own layout on the disk; what is not there, or cannot be, has no files."""
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [{"commit": [COMMIT]}, None, None]

"""`mmkd push` against a stand-in of the hub: what is sent and refused, and what is said when the hub or the way to it fails."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import progress_bar_states
from tiny import tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError
from mmkd.runs.push import planned, push

CARD = """---
library_name: transformers
---
<!-- mmkd wrote this card -->

# A valve reader

It was trained with sample-teacher as its teacher; see https://example.org/a/b/c and `/valves`.
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "student"
    tiny_tower(1).save(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture
def student(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "run" / "student"
    copy.mkdir(parents=True)
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and a client that knows no other; waits between its tries are left out."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setitem(progress_bar_states, "_global", False)
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_a_student_arrives_as_it_is(hub, student, capsys):
    assert main(["push", str(student), "me/valves"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/valves"
    there = hub.repositories["me/valves"]
    assert there["private"] is True
    assert there["files"] == {path.name: path.read_bytes() for path in student.iterdir()}
    assert len(hub.objects) == 1  # the weights
    commits = sum("/commit/" in asked for asked in hub.asked)
    assert push(student, "me/valves").endswith("me/valves")  # what is there is not sent again
    assert sum("/commit/" in asked for asked in hub.asked) == commits


def test_a_run_sends_its_student_under_a_name_of_ones_own(hub, student):
    (student.parent / "recipe.yaml").write_text("title: t\n")
    (student.parent / "summary.json").write_text("{}")
    assert push(student.parent, "valves", public=True) == f"{hub.url}/me/valves"
    assert hub.repositories["me/valves"]["private"] is False
    assert "summary.json" not in hub.repositories["me/valves"]["files"]


def test_a_private_student_does_not_go_where_everybody_looks(hub, student):
    hub.repositories["me/shown"] = {"private": False, "files": {}}
    with pytest.raises(DataError, match="me/shown is there and public; give --public"):
        push(student, "me/shown")
    push(student, "me/shown", public=True)
    assert "config.json" in hub.repositories["me/shown"]["files"]


def test_a_dry_run_lists_and_asks_nobody(hub, student, capsys):
    assert main(["push", str(student), "me/valves", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{student} -> me/valves (private): {len(list(student.iterdir()))} files" in out
    assert f"{(student / 'config.json').stat().st_size / 1000:.1f} kB" in out and "  # A valve reader" in out
    assert "library_name" not in out and "mmkd wrote" not in out and not hub.asked
    (student / "README.md").unlink()
    assert main(["push", str(student), "me/valves", "--dry-run"]) == 2
    assert "refused: there is no model card; `mmkd report RUN`" in capsys.readouterr().out


def spoiled(student: Path, name: str, text: str = "x") -> None:
    (student / name).parent.mkdir(parents=True, exist_ok=True)
    (student / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("checkpoint-20/trainer_state.json", "{}", "checkpoints or the state of an optimiser"),
        ("optimizer.pt", "x", "checkpoints or the state of an optimiser (optimizer.pt)"),
        ("pytorch_model.bin", "x", "pickled files, which run code when they are read (pytorch_model.bin)"),
        ("README.md", "  \n", "no model card"),
        ("README.md", CARD + "data: /home/ann/valves/train.jsonl\n", "paths of this machine (/home/ann/valves/train.jsonl)"),
        ("README.md", CARD + "made in ~/runs/a and C:\\Users\\ann\\b", "(~/runs/a, C:\\Users\\ann\\b)"),
        ("README.md", CARD + "hf_" + "a" * 34, "a token of the hub"),
    ],
)
def test_what_is_not_for_others_is_not_sent(hub, student, capsys, name, text, words):
    spoiled(student, name, text)
    assert main(["push", str(student), "me/valves"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not hub.asked
    assert any(words in why for why in planned(student).wrong)


def test_links_do_not_lead_out_of_the_folder(hub, student, tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (student / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "links that lead out of the folder (notes.txt)" in planned(student).wrong[0]


def test_a_damaged_student_is_not_sent(hub, tmp_path):
    from mmkd.base.files import save_whole

    save_whole(tmp_path / "student", tiny_tower(2).save)
    spoiled(tmp_path / "student", "README.md", CARD)
    with (tmp_path / "student" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(DataError, match=r"model.safetensors is not what was written; put it back"):
        push(tmp_path / "student", "me/valves")
    assert not hub.asked


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"token": "hf_other"}, "the hub refuses (401): the hub does not know the token; log in with `hf auth login`"),
        ({"readers": ("hf_right",), "token": "hf_other"}, "(403): the token may not write to me/valves; take one with write"),
        ({"status": {"/preupload/": 404}}, "(404): the hub has no place me/valves"),
        ({"status": {"/commit/": 507}}, "(507): "),
        ({"cut": "/preupload/"}, "the connection to the hub broke ("),
        ({"cut": "/objects/"}, "the connection to the hub broke ("),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, student, capsys, fault, words):
    for name, value in fault.items():
        setattr(hub, name, value)
    assert main(["push", str(student), "me/valves"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("mmkd: ") and error.count("\n") == 1
    hub.token, hub.readers, hub.cut, hub.status = "hf_right", (), "", {}
    push(student, "me/valves")  # the same command then sends what is missing
    assert hub.repositories["me/valves"]["files"].keys() == {path.name for path in student.iterdir()}


def test_without_a_token_nobody_is_asked(hub, student, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    with pytest.raises(DataError, match="no token for the hub; log in with `hf auth login`, or set HF_TOKEN"):
        push(student, "me/valves")
    assert not hub.asked


def test_a_hub_that_is_not_there(hub, student, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(DataError, match="connection to the hub broke"):
        push(student, "me/valves")


@pytest.mark.parametrize(("folder", "repo", "words"), [
    ("nowhere", "me/valves", "there is no folder nowhere"), (".", "me/valves", "holds no model"),
    (None, "a/b/c", "no name of a repository"), (None, "me/val ves", "no name of a repository"),
])  # fmt: skip
def test_mistakes(hub, student, monkeypatch, folder, repo, words):
    monkeypatch.chdir(student.parent.parent)
    with pytest.raises(DataError, match=words):
        push(folder or student, repo)
    (student.parent.parent / "begun").mkdir()
    spoiled(student.parent.parent / "begun", "recipe.yaml", "title: t")
    with pytest.raises(DataError, match="is a run without a student"):
        planned("begun")
    assert not hub.asked


def test_the_command_asks_the_hub_of_its_environment(model):
    with Hub() as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
        command = [sys.executable, "-m", "mmkd.cli", "push", str(model), "org/valves"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{server.url}/org/valves\n", "")
        assert set(server.repositories["org/valves"]["files"]) == {path.name for path in model.iterdir()}
        done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr and done.stderr.count("\n") == 1

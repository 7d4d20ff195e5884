"""Processes of a launch end when one of them dies, and only then."""

import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import os, signal, sys, time
from mmkd.base.peers import watching_peers
what = sys.argv[1:][int(os.environ["RANK"])]
try:
    with watching_peers(grace=0.5):
        print("met", flush=True)
        if what == "waits":
            time.sleep(60)
        elif what == "dies":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "fails":
            raise SystemExit(2)
    if what == "works":
        time.sleep(2)  # longer than the grace
except SystemExit as error:
    os._exit(error.code)
"""


def launch(*what: str) -> list[tuple[int, str]]:
    """Exit codes and outputs of processes that do what their word says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(what))}
    shared = {**os.environ, **meeting, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WORKER, *what]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env={**shared, "RANK": str(number)}, **pipes) for number in range(len(what))]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.parametrize("what", [("dies", "waits", "waits"), ("waits", "waits", "dies"), ("waits", "fails", "waits")])
def test_when_one_dies_or_fails_the_others_end_and_say_whose_output_to_read(what):
    lost = next(number for number, word in enumerate(what) if word != "waits")
    for number, (code, output) in enumerate(launch(*what)):
        if number == lost:
            assert code in (-9, 2)
        else:
            assert code == 1 and f"process {number} of 3 ends, since process {lost} of this run did" in output
            assert "Traceback" not in output


def test_one_whose_work_is_done_may_go_before_the_others():
    assert [(code, output.strip()) for code, output in launch("ends", "works", "works")] == [(0, "met")] * 3
    assert [(code, output.strip()) for code, output in launch("works", "ends")] == [(0, "met")] * 2


def test_a_single_process_opens_nothing(monkeypatch):
    from mmkd.base.peers import watching_peers

    monkeypatch.setattr(socket, "create_server", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with watching_peers():
        pass

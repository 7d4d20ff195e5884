"""One of several processes ends with its code and all that it printed; one run writes to a folder at a time."""

import os
import subprocess
import sys
import threading

import pytest

from mmkd.base.distributed import alone_in
from mmkd.errors import DataError

_SCRIPT = """
import logging, sys
from mmkd.base.distributed import end_process, is_main_process, rank, world_size
print(rank(), world_size(), is_main_process())
end_process(3)
"""


@pytest.mark.parametrize(("launched", "said"), [({}, "0 1 True"), ({"RANK": "1", "WORLD_SIZE": "2"}, "1 2 False")])
def test_a_process_ends_with_its_code_and_its_output(launched, said):
    environment = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, **launched}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, said, "")


HOLD = """
import sys
from pathlib import Path
from mmkd.base.distributed import alone_in
with alone_in(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read(1)
print("free", flush=True)
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that writes to a folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_has_one_run_that_writes_to_it(tmp_path, other_run, monkeypatch):
    with pytest.raises(DataError, match="another run is writing it"), alone_in(tmp_path, "it"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="another run"), alone_in(tmp_path, "it", wait=True):  # others would wait for this process
        pass
    monkeypatch.setenv("RANK", "1")
    with alone_in(tmp_path, "it"):  # of one launch the first process claims for all
        pass


def test_a_run_that_waits_goes_on_when_the_other_has_ended(tmp_path, other_run, caplog):
    caplog.set_level("INFO")
    threading.Timer(0.5, other_run.kill).start()
    with alone_in(tmp_path, "it", wait=True):
        assert other_run.wait() < 0  # killed, which ends its claim
    assert "waiting for another run that writes it" in caplog.text
    with alone_in(tmp_path, "it"):
        pass


GONE = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:53676: Connection reset by peer. This is typically"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4012"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
]


@pytest.mark.parametrize("error", GONE)
def test_the_end_of_another_process_is_told_as_that(error, monkeypatch):
    from mmkd.base.distributed import lost_connection

    assert lost_connection(error) is None, "one process has no others"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert lost_connection(error).startswith("process 0 of 2 ends, since another one of this run did")
    assert lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_connection(KeyError("Connection reset by peer")) is None

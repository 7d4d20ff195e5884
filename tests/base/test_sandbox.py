"""The sandbox: what programs may do, and everything that they may not."""

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mmkd.base import sandbox
from mmkd.base.sandbox import Limits, run_program, sandbox_refusal
from mmkd.errors import DataError

SHORT = Limits(seconds=2.0)
needs_one = pytest.mark.skipif(bool(sandbox_refusal()), reason=f"no sandbox can be made here: {sandbox_refusal()}")


def run(code, limits=SHORT):
    return run_program(textwrap.dedent(code), limits)


def tried(act):
    """What a program says of an act: "done", or the error's name."""
    return run(f"""
        import ctypes, os, signal, socket, threading
        try:
            {act}
            print("done")
        except BaseException as error:
            print(type(error).__name__)
    """).output.strip()


@needs_one
def test_a_program_runs_with_the_standard_library_and_its_code_is_told():
    ended = run("import json, math, re, fractions\nprint(json.dumps({'a': math.comb(5, 2)}))")
    assert (ended.code, ended.output, ended.late, ended.cut) == (0, '{"a": 10}\n', False, False)
    assert run("import sys; sys.exit(3)").code == 3
    failed = run("1 / 0")
    assert failed.code == 1 and "ZeroDivisionError" in failed.output
    assert run("print('é', '\\ud800'.encode('utf-8', 'replace'))").output.startswith("é")
    assert run("input()").code == 1  # nothing to read


@needs_one
def test_no_network():
    server = socket.create_server(("127.0.0.1", 0))
    reached = []
    threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
    port = server.getsockname()[1]
    assert tried(f"socket.create_connection(('127.0.0.1', {port}), 1)") == "OSError"
    assert tried("socket.create_connection(('8.8.8.8', 53), 1)") == "OSError"
    assert tried("socket.getaddrinfo('example.com', 80)") == "gaierror"
    assert not reached
    server.close()


@needs_one
def test_no_files_outside(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/dev/null", os.path.abspath(__file__)):
        assert tried(f"open({str(path)!r}).read()") == "FileNotFoundError", path
    assert tried("open('/escaped', 'w')") in ("PermissionError", "OSError")
    assert tried("open('/usr/lib/escaped', 'w')") in ("PermissionError", "OSError")
    assert tried("open('../../../../etc/passwd').read()") == "FileNotFoundError"
    assert run("open('own.txt', 'w').write('x'); print(open('own.txt').read())").output == "x\n"
    names = run("import os; print(sorted(os.environ), os.getcwd())").output
    assert names == "['HOME', 'LC_CTYPE', 'PYTHONHASHSEED'] /work\n"


@needs_one
def test_no_further_process_thread_or_right():
    assert tried("os.fork()") == "BlockingIOError"
    assert tried("threading.Thread(target=print).start()") == "RuntimeError"
    assert tried("os.execv('/bin/sh', ['sh'])") == "FileNotFoundError"
    assert tried("os.setuid(0)") in ("PermissionError", "OSError") and tried("os.chroot('/work')") == "PermissionError"
    assert run("import os; print(os.getuid(), os.getgid())").output == "65534 65534\n"
    for flags in (0x10000000, 0x20000, 0x40000000):  # a user namespace, mounts, a network
        assert run(f"import ctypes; print(ctypes.CDLL(None).unshare({flags}))").output == "-1\n"
    assert run("import ctypes; print(ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None))").output == "-1\n"
    assert tried("os.kill(os.getppid(), signal.SIGSTOP)") in ("done", "PermissionError")  # the first of its own namespace at most
    assert tried(f"os.kill({os.getpid()}, 0)") == "ProcessLookupError"


@needs_one
@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\nwhile True: time.sleep(1)", "import signal\nsignal.pause()",
     "import signal\nfor n in (1, 2, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
     "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"],
)  # fmt: skip
def test_endless_programs_and_fork_bombs_are_stopped_and_nothing_is_left(code):
    started = time.monotonic()
    ended = run(f"# endless {os.getpid()}\n" + code, Limits(seconds=0.3))
    assert ended.code != 0 and time.monotonic() - started < 6
    deadline = time.monotonic() + 5
    while left := subprocess.run(["pgrep", "-f", "-I -S -B /program.py"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@needs_one
def test_memory_output_and_files_end_at_their_limits():
    ended = run("x = bytearray(400 * 2**20)\nprint('never')")
    assert ended.code == 1 and "MemoryError" in ended.output
    flood = run("while True: print('x' * 1000)", Limits(seconds=5, output=4096))
    assert flood.cut and len(flood.output) == 4096 and flood.code != 0
    full = run("""
        n = 0
        try:
            while True:
                open(f"f{n}", "wb").write(b"x" * 60000)
                n += 1
        except OSError as error:
            print(n)
    """, Limits(seconds=5, files=2**20))  # fmt: skip
    assert 1 <= int(full.output) < 20


@needs_one
def test_one_run_leaves_nothing_for_the_next():
    assert run("open('left', 'w').write('x')").code == 0
    assert run("import os; print(os.listdir('/work'))").output == "[]\n"


def test_where_no_sandbox_can_be_made_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_python", lambda: sys.executable)
    broken = tmp_path / "child.py"
    broken.write_text("import os, sys\nos.write(int(sys.argv[2]), b'unshare: Operation not permitted')\nos._exit(1)\n")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    sandbox_refusal.cache_clear()
    try:
        assert "unshare: Operation not permitted" in sandbox_refusal() and "user namespaces" in sandbox_refusal()
        with pytest.raises(DataError, match="no program is executed"):
            run_program("print(1)")
        monkeypatch.setattr(sandbox, "_run", lambda code, limits: sandbox.Ended(0, "not apart: ['network']\n"))
        sandbox_refusal.cache_clear()
        assert "does not keep programs apart here (not apart: ['network'])" in sandbox_refusal()
        monkeypatch.setattr(sandbox.sys, "platform", "darwin")
        sandbox_refusal.cache_clear()
        assert "this is darwin" in sandbox_refusal()
    finally:
        monkeypatch.undo()
        sandbox_refusal.cache_clear()

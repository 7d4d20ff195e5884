"""Runs a program that nobody vouches for, apart from the machine: no network, no files, no processes, and limits.

Linux namespaces make it, without further software: a file system in memory that holds the interpreter and its libraries, read
only; no network but a loopback that is down; one process without rights. It is no virtual machine: the kernel is shared, and
system calls are not filtered. Where any part cannot be made, nothing is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmkd.errors import DataError, one_line

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SETUP = 10.0  # seconds in which the sandbox must be there
# What a program that finds itself apart prints; tried before the first program is run.
_PROBE = """
import os, socket, sys
way = sys.base_prefix.strip("/").split("/")  # nothing but the interpreter lies where it lies
open_ = sorted(set(os.listdir("/")) - {"usr", "lib", "lib64", "work", "program.py", way[0]})
for number in range(1, len(way) if way[0] != "usr" else 0):
    open_ += [name for name in os.listdir("/" + "/".join(way[:number])) if name != way[number]]
for name, act in (("fork", os.fork),
                  ("network", lambda: socket.create_connection(("127.0.0.1", 9), 1)),
                  ("root", lambda: os.setuid(0)), ("write", lambda: open("/escaped", "w")),
                  ("chroot", lambda: os.chroot("/work"))):
    try:
        act()
        open_.append(name)
    except ConnectionRefusedError:
        open_.append("network")
    except OSError:
        pass
print("apart" if not open_ and os.getuid() != 0 else f"not apart: {open_}")
"""


@dataclass(frozen=True)
class Limits:
    """seconds: of the clock.  memory: bytes of addresses.  output: bytes that it prints, and of a file.  files: of all files."""

    seconds: float = 5.0
    memory: int = 256 * 2**20
    output: int = 64 * 2**10
    files: int = 8 * 2**20


@dataclass(frozen=True)
class Ended:
    """How a program ended. code: 0 for one that ran to its end.  output: what it printed, on both streams."""

    code: int
    output: str
    late: bool = False  # it was stopped
    cut: bool = False  # it printed as much as it may, or more


def run_program(code: str, limits: Limits = Limits()) -> Ended:
    """Runs Python code in the sandbox. Raises DataError where there is none."""
    if why := sandbox_refusal():
        raise DataError(why)
    return _run(code, limits)


@cache
def sandbox_refusal() -> str:
    """Why no sandbox can be made here; "" where one can, which is tried once."""
    if sys.platform != "linux":
        return f"a program is executed only in a sandbox of Linux namespaces, and this is {sys.platform}"
    try:
        ended = _run(_PROBE, Limits(seconds=_SETUP))
    except DataError as error:
        return str(error)
    if ended.output.strip() == "apart":
        return ""
    return f"the sandbox does not keep programs apart here ({one_line(ended.output or f'code {ended.code}', 120)})"


def _run(code: str, limits: Limits) -> Ended:
    folders, links = _needed()
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryFile() as output:
        os.chmod(root, 0o755)
        given = {
            "code": code, "root": root, "python": _python(), "folders": folders, "links": links, "seconds": limits.seconds,
            "memory_bytes": limits.memory, "output_bytes": limits.output, "files_bytes": limits.files,
        }  # fmt: skip
        told, tell = os.pipe()
        with open(told, "rb") as errors:
            try:
                late, number = _wait(given, output.fileno(), tell, limits.seconds)
            finally:
                os.close(tell)
            if why := errors.read().decode(errors="replace"):
                raise DataError(
                    f"no sandbox can be made here, so no program is executed: {one_line(why, 200)}. It takes Linux that lets "
                    "this user make user namespaces (kernel.unprivileged_userns_clone, max_user_namespaces, AppArmor), or root"
                )
        output.seek(0)
        said = output.read(limits.output)
        return Ended(number, said.decode("utf-8", errors="replace"), late, len(said) >= limits.output)


def _wait(given: dict, output: int, tell: int, seconds: float) -> tuple[bool, int]:
    """Starts it and waits for its end: (whether it was stopped, its code)."""
    command = [_python(), "-I", "-S", "-B", str(_CHILD), str(output), str(tell)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(output, tell), env={},
        start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(given).encode())
            process.stdin.close()
        return False, process.wait(timeout=seconds + 1)
    except subprocess.TimeoutExpired:
        return True, 137
    finally:
        # Its first process goes with the group, and with that process all others of its namespace.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _python() -> str:
    return os.path.realpath(sys.executable)  # of a virtual environment the interpreter that it was made of


@cache
def _needed() -> tuple[list[str], list[str]]:
    """(folders, links) of the interpreter and the libraries that it is linked with."""
    folders, links = [], []
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(path):
            links.append(path)
        elif os.path.isdir(path):
            folders.append(path)
    prefix = os.path.realpath(sys.base_prefix)
    if prefix == "/usr":
        folders, links = ([path for path in some if not path.startswith("/usr")] for some in (folders, links))
        return ["/usr", *folders], links
    return [*folders, prefix], links

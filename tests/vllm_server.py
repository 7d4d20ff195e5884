"""A real vLLM on loopback, where one is installed: MMKD_VLLM is the folder of `scripts/serve/install_vllm.sh`."""

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

START = Path(__file__).resolve().parents[1] / "scripts" / "serve" / "start_vllm.sh"
SECONDS = 400  # within which it has to be there, on a busy machine


def environment() -> str | None:
    """The folder of an environment with vLLM; None where there is none."""
    given = os.environ.get("MMKD_VLLM")
    found = Path(given) / "bin" / "vllm" if given else shutil.which("vllm")
    return str(Path(found).parents[1]) if found and Path(found).exists() else None


@contextmanager
def vllm(model: Path, log: Path, name: str = "m", *options: str):
    """The address of a server of this model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["bash", str(START), environment(), str(model), str(port), "--served-model-name", name, *options]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False

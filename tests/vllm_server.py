"""A real vLLM on loopback, where one is installed: MMKD_VLLM is the folder of `scripts/serve/install_vllm.sh`."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from mmkd.runs.engines import free_port, running

START = Path(__file__).resolve().parents[1] / "scripts" / "serve" / "start_vllm.sh"


def environment() -> str | None:
    """The folder of an environment with vLLM; None where there is none."""
    given = os.environ.get("MMKD_VLLM")
    found = Path(given) / "bin" / "vllm" if given else shutil.which("vllm")
    return str(Path(found).parents[1]) if found and Path(found).exists() else None


@contextmanager
def vllm(model: Path, log: Path, name: str = "m", *options: str):
    """The address of a server of this model."""
    port = free_port()
    command = ["bash", str(START), environment(), str(model), str(port), "--served-model-name", name, *options]
    with log.open("w") as file, running(command, port, file) as url:
        yield url

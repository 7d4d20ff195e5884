"""Serving engines that are asked what a student answers: llama.cpp in this process, vLLM as a server on loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image

from mmkd.data.samples import Sample
from mmkd.errors import DataError, TowerError
from mmkd.teachers.wires import Client, base64_png, messages_of
from mmkd.towers.gguf import PICTURES, TEXT

TOKENS, LIKELIEST = 12, 20
PATIENCE = 20.0  # seconds for which a server that gives no answer is asked again
START = 600.0  # seconds within which vLLM has to be there
# For vLLM's build for CPUs; a GPU's does not read them. One core and a gigabyte for keys and values, where nothing else is said.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


class Engine(Protocol):
    def ask(self, sample: Sample, prompt: str, picture: Image.Image) -> tuple[list[int], dict[int, float]]:
        """Greedy token ids of one question to one picture, and the log-probabilities of the likeliest first tokens by id.

        prompt: the sample as our template renders it, with one `<image>`.
        """


@contextmanager
def llama_cpp(folder: Path) -> Iterator[Engine]:
    """llama.cpp's server in this process. folder: of `write_gguf`."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.mmproj.path = str(folder / TEXT), str(folder / PICTURES)
    options.n_ctx, options.n_parallel, options.warmup, options.n_gpu_layers = 2048, 1, False, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(options)  # ends with its last reference
    yield _LlamaCpp(Client(server.listening_address, PATIENCE))
    del server


class _LlamaCpp:
    def __init__(self, client: Client):
        self.client = client
        self.marker = client.ask("/props")["media_marker"]

    def ask(self, sample: Sample, prompt: str, picture: Image.Image) -> tuple[list[int], dict[int, float]]:
        """No log-probability is told where the first token is no whole character."""
        asked = {"prompt_string": prompt.replace("<image>", self.marker), "multimodal_data": [base64_png(picture)]}
        options = {"n_predict": TOKENS, "temperature": 0, "n_probs": LIKELIEST, "return_tokens": True, "cache_prompt": False}
        found = self.client.ask("/completion", {"prompt": asked, **options})
        steps = found.get("completion_probabilities") or []
        first = steps[0]["top_logprobs"] if steps and steps[0]["id"] == found["tokens"][0] else []
        return found["tokens"], {entry["id"]: entry["logprob"] for entry in first}


@contextmanager
def vllm(folder: Path, options: list[str]) -> Iterator[Engine]:
    """A server of `vllm serve` in float32. folder: of the student.  options: more of the command's.

    Raises DataError where there is no such command, TowerError with its last words where it does not start.
    """
    command, port = vllm_command(), free_port()
    environment = {**ENVIRONMENT, **os.environ}
    openmp = Path(command).resolve().parents[1] / "lib" / "libiomp5.so"
    if openmp.exists():
        environment.setdefault("LD_PRELOAD", str(openmp))
    asked = [command, "serve", str(folder), "--served-model-name", "student", "--host", "127.0.0.1", "--port", str(port)]
    asked += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-logprobs", str(LIKELIEST), *options]
    with tempfile.TemporaryFile("w+") as log:
        try:
            with running(asked, port, log, environment) as url:
                yield _Vllm(Client(url, PATIENCE))
        except TowerError as error:  # its own words tell more than that it is not there
            raise TowerError(f"vLLM does not serve this student: {_first_error(log) or error}") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, log: IO[str], environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address of a server that a command starts on loopback, once its /health answers; it is ended behind the block.

    Raises TowerError for one that ends by itself or is not there after `START` seconds; its words are in `log`.
    """
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)


def vllm_command() -> str:
    """The command `vllm` that stands first in PATH. Raises DataError where there is none."""
    if (command := shutil.which("vllm")) is None:
        raise DataError("there is no command `vllm` in PATH; scripts/serve/install_vllm.sh installs its build for CPUs")
    return command


class _Vllm:
    def __init__(self, client: Client):
        self.client = client

    def ask(self, sample: Sample, prompt: str, picture: Image.Image) -> tuple[list[int], dict[int, float]]:
        """The server renders the prompt by itself, from the folder's chat template."""
        options = {"temperature": 0, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": LIKELIEST}
        ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"model": "student", "messages": messages_of(sample, [picture]), **options, **ids}
        found = self.client.ask("/v1/chat/completions", body)["choices"][0]
        first = found["logprobs"]["content"][0]["top_logprobs"]
        return found["token_ids"], {int(entry["token"].removeprefix("token_id:")): entry["logprob"] for entry in first}


def _wait(server: subprocess.Popen[Any], url: str) -> None:
    end = time.monotonic() + START
    while not _answers(url):
        if server.poll() is not None or time.monotonic() > end:
            raise TowerError(f"it ended or was not there after {START:.0f} seconds, without a word")
        time.sleep(0.5)


def _first_error(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if re.search(r"\w+Error: ", line) and "WARNING" not in line]
    return lines[0][-400:] if lines else ""  # the later ones say that something was wrong before


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _end(server: subprocess.Popen[Any]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, kind)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                continue

"""How a served teacher is spoken to: requests with retries, and what each kind of server calls things.

Only the address that the recipe gives is ever asked: no proxy, no redirect.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.samples import Sample
from mmkd.errors import DataError, TowerError, one_line

logger = logging.getLogger(__name__)

TIMEOUT = 120.0  # seconds of one request
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # between tries
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # answers after which it is tried again


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


class Client:
    """Sends JSON to one server. patience: seconds that a server which does not answer is waited for.

    lost: how often it had to be waited for; who asks again may want to know that it is still the same server.
    """

    def __init__(self, url: str, patience: float):
        self.url, self.patience, self.lost = url.rstrip("/"), patience, 0
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's answer. Raises TowerError for one that stays away, DataError for a request that it refuses."""
        wait, deadline, told = FIRST_WAIT, time.monotonic() + self.patience, False
        while True:
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN:
                    words = one_line(error.read().decode("utf-8", "replace"), 400)
                    more = ". Start it with --max-logprobs of teacher.top_k, or lower that" if "logprobs" in words else ""
                    raise DataError(f"{self.url}{path} refuses the request ({error.code}): {words}{more}") from error
                why = f"answers {error.code}"
            except (OSError, http.client.HTTPException) as error:  # not there, too slow, broken off
                why = f"does not answer ({type(error).__name__}: {one_line(error, 120)})"
            except ValueError as error:
                why = f"sends what is no JSON ({one_line(error, 120)})"
            if time.monotonic() + wait > deadline:
                raise TowerError(
                    f"the server {self.url} {why} at {path}, and did so for {self.patience:.0f} seconds; start it again and "
                    "run the same command, which goes on from the last checkpoint"
                )
            if not told:
                logger.warning("the server %s %s at %s; trying again for up to %.0f seconds", self.url, why, path, self.patience)
            told, self.lost = True, self.lost + (not told)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())


@dataclass(frozen=True)
class Rendered:
    """A prompt as the server reads it: its token ids with pictures expanded, and what else goes back with them."""

    ids: list[int]
    body: dict[str, Any]


class Wire(ABC):
    """What one kind of server is asked."""

    def __init__(self, client: Client, model: str):
        self.client, self.model = client, model

    @abstractmethod
    def models(self) -> dict[str, int | None]:
        """The models that it serves, and how many tokens it reads with each at most, where it tells."""

    @abstractmethod
    def render(self, sample: Sample, pictures: Sequence[Any] | None = None, *, answer: str | None = None) -> Rendered:
        """A sample's prompt by the server's own processor. pictures: in place of its own.  answer: written behind it."""

    @abstractmethod
    def top(self, rendered: Rendered, ids: Sequence[int], k: int) -> list[dict[int, float] | None]:
        """For each of the tokens `ids`, read behind one another with the prompt's pictures: the log-probabilities, given those
        before it, of the k likeliest tokens and of itself. Raises DataError where the server gives fewer."""


class VLLM(Wire):
    """vLLM 0.32 (`vllm serve MODEL --enable-scale-out --max-logprobs K`): token ids go in, by its render endpoint.

    Rendering gives the ids with pictures expanded, and the pictures as its processor made them (`features`), which go back with
    the ids of prompt and answer. The first of `prompt_logprobs` is null; entry j is of token j: the k likeliest, and token j
    itself where it is not among them, at temperature 1 whatever is asked for.
    """

    def models(self) -> dict[str, int | None]:
        entries = _part(self.client.ask("/v1/models"), "data", "/v1/models")
        return {str(entry["id"]): entry.get("max_model_len") for entry in entries}

    def render(self, sample: Sample, pictures: Sequence[Any] | None = None, *, answer: str | None = None) -> Rendered:
        path = "/v1/chat/completions/render"
        messages = messages_of(sample, pictures)
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        body = self.client.ask(path, {"model": self.model, "messages": messages, "add_generation_prompt": answer is None})
        body = body[0] if isinstance(body, list) and body else body
        return Rendered([int(token) for token in _part(body, "token_ids", path)], body)

    def top(self, rendered: Rendered, ids: Sequence[int], k: int) -> list[dict[int, float] | None]:
        path = "/inference/v1/generate"
        sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        found = self.client.ask(path, {**rendered.body, "model": self.model, "token_ids": list(ids), "sampling_params": sampling})
        entries = _part(found, "prompt_logprobs", path)
        try:
            return [None if e is None else {int(token): float(said["logprob"]) for token, said in e.items()} for e in entries]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{self.client.url}{path}: prompt_logprobs are of another form than vLLM's ({error})") from error


WIRES: dict[str, type[Wire]] = {"vllm": VLLM}

# Wires that are asked for and cannot be kept to what a served teacher promises, and why.
REFUSED = {
    "openai": (
        "the interface of OpenAI gives log-probabilities of the tokens that a server writes itself, as text, never of an answer "
        "that it is handed, so no row of a given answer can be had from it; serve the model with vLLM (`wire: vllm`), or let it "
        "write answers and train on those (`answers: FILE` of a data entry)"
    ),
    "sglang": (
        "SGLang's /generate takes token ids and pictures and returns log-probabilities of its input, but tells neither the ids "
        "with its pictures expanded nor how many visual tokens they became, so that what it read cannot be compared with what "
        "is trained; it has not been tried here either. Serve the model with vLLM (`wire: vllm`)"
    ),
}


def _part(answer: Any, name: str, path: str) -> Any:
    if not isinstance(answer, dict) or not isinstance(answer.get(name), list):
        raise DataError(f"the server's answer at {path} has no list {name!r}; is it a vLLM of a version with this endpoint?")
    return answer[name]


def messages_of(sample: Sample, pictures: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    shown = iter([ref.load() for ref in sample.images] if pictures is None else pictures)
    messages = []
    for turn in sample.prompt_turns:
        parts = [_picture(next(shown)) if part is None else {"type": "text", "text": part} for part in turn.parts]
        messages.append({"role": turn.role, "content": parts if turn.images else turn.text})
    return messages


def base64_png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(picture: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64_png(picture)}}


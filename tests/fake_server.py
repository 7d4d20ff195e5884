"""A server on loopback that speaks as vLLM 0.32 does, with a tower behind it, and that can misbehave.

What a real one says is in tests/teachers/vllm_*.json.gz, and `scripts/serve/recording.py` holds it against a server.
"""

import base64
import io
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from PIL import Image

from mmkd.towers.inputs import with_answer_ids
from mmkd.towers.samples import Sample, Turn
from mmkd.towers.tower import Tower


@dataclass
class Shown:
    """A picture as it came over the wire."""

    data: str

    @property
    def key(self):
        return self.data

    def load(self):
        return Image.open(io.BytesIO(base64.b64decode(self.data.partition(",")[2]))).convert("RGB")


@dataclass
class Server:
    """tower: what answers; its processor renders.  Everything else is a fault."""

    tower: Tower
    name: str = "m"
    max_logprobs: int = 20
    max_model_len: int = 512
    drops_pictures: bool = False
    blind: bool = False
    mixes: bool = False  # gives each request the pictures of another that came at the same time
    swaps: bool = False  # the pictures of one sample change places
    status: list[int] = field(default_factory=list)  # of the next answers, 200 after them
    cut: int = 0  # so many answers end in the middle
    sleep: list[float] = field(default_factory=list)  # seconds before the next answers
    short: bool = False  # one row is missing
    fewer: bool = False  # one likely token of each row is missing
    other_tokens: bool = False  # rows of other tokens than were sent
    end: str = ""  # what its template writes in place of the end
    after_failure: Tower | None = None  # what answers once it has failed
    log: list[str] = field(default_factory=list)

    def __enter__(self):
        self.kept, self.busy, self.lock = {}, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                server.answer(self, None)

            def do_POST(self):
                server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body):
        with self.lock:
            self.log.append(handler.path)
            status = self.status.pop(0) if self.status else 200
            cut, self.cut = self.cut > 0, max(0, self.cut - 1)
            sleep = self.sleep.pop(0) if self.sleep else 0
            self.busy += 1
            if (status != 200 or cut or sleep) and self.after_failure is not None:
                self.tower = self.after_failure
        time.sleep(sleep)
        try:
            content = {"error": "down"} if status != 200 else self.content(handler.path, body)
        except ValueError as error:
            status = 404 if "does not exist" in str(error) else 400
            content = {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": status}}
        with self.lock:
            self.busy -= 1
        data = json.dumps(content).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if cut else data)
        except OSError:
            pass  # who asked has gone

    def content(self, path, body):
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": self.name, "object": "model", "max_model_len": self.max_model_len}]}
        if body["model"] != self.name:
            raise ValueError(f"The model `{body['model']}` does not exist. Valid aliases: {self.name}.")
        if path == "/v1/chat/completions/render":
            return self.render(body)
        assert path == "/inference/v1/generate", path
        return self.generate(body)

    def render(self, body):
        turns, pictures, answer = [], [], None
        for message in body["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
            if message["role"] == "assistant":
                answer = parts[0]["text"]
                continue
            shown = [Shown(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            pictures += [] if self.drops_pictures else shown
            turns.append(Turn(message["role"], text, 0 if self.drops_pictures else len(shown)))
        if self.swaps:
            pictures = pictures[::-1]
        asked = Sample("served", tuple(pictures), tuple(turns))
        prompt = self.tower.encode(asked, with_answer=False)
        ids = prompt.input_ids.tolist()
        if answer is not None:
            ids += self.tower.answer_tokens(asked, answer)[:-1]
            ids += self.tower.tokenizer(self.end)["input_ids"] if self.end else sorted(self.tower.stop_ids)
        with self.lock:
            number = len(self.kept)
            self.kept[number] = prompt
        features = {"mm_hashes": {"image": [str(number)]}, "kwargs_data": {"image": [""]}} if pictures else None
        if features is None:  # a real one needs nothing but ids then
            with self.lock:
                self.plain = prompt
        sampling = {"temperature": 1.0, "max_tokens": self.max_model_len - len(ids), "top_p": 1.0}
        return {"request_id": "1", "token_ids": ids, "features": features, "model": self.name, "sampling_params": sampling}

    @torch.no_grad()
    def generate(self, body):
        k, ids = body["sampling_params"]["prompt_logprobs"], body["token_ids"]
        if k > self.max_logprobs:
            raise ValueError(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=prompt_logprobs, value={k})"
            )
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.max_model_len}."
            )
        if body["features"] is None:
            return self.said(self.plain, ids, k)
        number = int(body["features"]["mm_hashes"]["image"][0])
        if self.mixes and self.busy > 1:
            pictured = bool(self.kept[number].images)
            number = max(n for n, kept in list(self.kept.items()) if n != number and bool(kept.images) == pictured)
        prompt = self.kept[number]
        if self.blind:
            prompt.pixels = {name: torch.zeros_like(pixels) for name, pixels in prompt.pixels.items()}
        return self.said(prompt, ids, k)

    def said(self, prompt, ids, k):
        one = with_answer_ids(prompt, [])
        one.input_ids = torch.tensor(ids)
        one.targets = torch.full_like(one.input_ids, -100)
        inputs = self.tower.collate([one])
        with self.lock:
            hidden = self.tower.read(inputs, self.tower.see(inputs))[0]
        log_probs = self.tower.head(hidden).double().log_softmax(-1)  # [L, V]
        rows = [None]
        for place, token in enumerate(ids[1:]):
            token = (token + 1) % 200 if self.other_tokens else token
            best = log_probs[place].topk(k - self.fewer).indices.tolist()
            said = [*best, *([] if token in best or self.fewer else [token])]
            if self.fewer and token not in best:
                said[-1] = token
            said = {t: (n + 1, log_probs[place, t].item()) for n, t in enumerate(said)}
            said = {t: said[t] for t in sorted(said, key=lambda one: one != token)}  # the token itself stands first
            rows.append({str(t): {"logprob": value, "rank": rank, "decoded_token": ""} for t, (rank, value) in said.items()})
        choices = [{"index": 0, "finish_reason": "length", "token_ids": [0], "logprobs": None}]
        return {"request_id": "1", "choices": choices, "prompt_logprobs": rows[:-1] if self.short else rows}

"""What a real server said, on loopback again: an exchange that is recorded through this server, and given back by it.

A request is known by its path and body: pictures by their pixels, what the server made of them by its own hash of them.
"""

import base64
import gzip
import hashlib
import io
import json
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

READ = ("token_ids", "features", "model", "sampling_params", "prompt_logprobs", "data", "error", "object")


class Exchange:
    """known: recorded answers by request; None to record those of the server at `forward`."""

    def __init__(self, known: dict | None = None, forward: str | None = None):
        self.known, self.forward = {} if known is None else known, forward
        self.missing: list[str] = []

    def __enter__(self):
        exchange = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                exchange.answer(self, b"")

            def do_POST(self):
                exchange.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler, body: bytes) -> None:
        key = request_key(handler.path, body)
        if self.forward is not None:
            status, content = _asked(self.forward + handler.path, body)
            self.known[key] = [status, brief(content)]
        elif key in self.known:
            status, content = self.known[key]
        else:
            self.missing.append(f"{handler.path} {key}")
            status, content = 400, {"error": {"message": "this request is not in the recording"}}
        data = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def _asked(url: str, body: bytes):
    request = urllib.request.Request(url, body or None, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def brief(content):
    """An answer without what mmkd does not read and what is large: of processed pictures the hash stays."""
    content = {name: value for name, value in content.items() if name in READ}
    if content.get("features"):
        content["features"] = {**content["features"], "kwargs_data": None}
    if content.get("prompt_logprobs"):
        content["prompt_logprobs"] = [
            row and {token: {"logprob": round(said["logprob"], 6), "rank": said["rank"]} for token, said in row.items()}
            for row in content["prompt_logprobs"]
        ]
    return content


def request_key(path: str, body: bytes) -> str:
    content = json.loads(body) if body else {}
    if content.get("features"):
        content["features"] = content["features"]["mm_hashes"]
    for message in content.get("messages", ()):
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                part["image_url"] = _pixels(part["image_url"]["url"])
    names = ("messages", "add_generation_prompt", "token_ids", "features", "sampling_params")
    chosen = {name: content.get(name) for name in names}
    return hashlib.sha256(f"{path} {json.dumps(chosen, sort_keys=True)}".encode()).hexdigest()[:24]


def _pixels(url: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return hashlib.sha256(str(picture.size).encode() + picture.tobytes()).hexdigest()


def load(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def write(path: Path, known: dict) -> None:
    """The same bytes for the same exchange."""
    path.write_bytes(gzip.compress(json.dumps(dict(sorted(known.items()))).encode(), mtime=0))

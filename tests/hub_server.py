"""A server on loopback that takes models as the Hugging Face hub does, by the calls of its client, and that can misbehave.

Its answers follow the client's own code (huggingface_hub): names of repositories, files as base64 in a commit, large files by the
batch call of Git LFS. It is no hub: nothing can be downloaded.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """token: the one that it knows.  Everything from `status` on is a fault."""

    token: str = "hf_right"
    repositories: dict[str, dict] = field(default_factory=dict)  # {name: {"private", "files": {name: bytes}}}
    asked: list[str] = field(default_factory=list)  # "METHOD path" of each request
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256
    readers: tuple[str, ...] = ()  # tokens that may only read
    cut: str = ""  # requests whose path holds this are cut
    status: dict[str, int] = field(default_factory=dict)  # {part of a path: what is answered}

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                self.answer(b"")

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_PUT = do_POST

            def answer(self, body):
                hub.asked.append(f"{self.command} {self.path}")
                if hub.cut and hub.cut in self.path:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, content = hub.say(self.command, self.path, self.headers, body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Content-Type", "application/json")
                if status >= 400:
                    self.send_header("X-Error-Message", content["error"])
                    if content.get("code"):
                        self.send_header("X-Error-Code", content["code"])
                self.end_headers()
                self.wfile.write(text)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    # ---- what it answers ----

    def say(self, method, path, headers, body):
        for part, status in self.status.items():
            if part in path:
                return status, {"error": "a fault"}
        if path.startswith("/objects/"):  # an address that was handed out needs no token
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token != self.token and token not in self.readers:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if method == "GET" and (found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(/revision/main)?(\?.*)?", path)):
            return self._info(found[1])
        if token in self.readers:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main(\?.*)?", path):
            modes = [
                {"path": one["path"], "shouldIgnore": False, "oid": self._oid(found[1], one["path"]),
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main(\?.*)?", path):
            return self._commit(found[1], body)
        return 404, {"error": f"no such call: {method} {path}"}

    def _oid(self, name, path):
        content = self.repositories[name]["files"].get(path)
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else hashlib.sha1(
            b"blob %d\0" % len(content) + content
        ).hexdigest()  # fmt: skip

    def _info(self, name):
        if name not in self.repositories:
            return 404, {"error": "Repository not found", "code": "RepoNotFound"}
        return 200, {"id": name, "private": self.repositories[name]["private"], "sha": "0" * 40, "siblings": []}

    def _create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = {"private": bool(private), "files": {}}
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def _object(self, one):
        known = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] in self.objects:
            return known
        return known | {"actions": {"upload": {"href": f"{self.url}/objects/{one['oid']}"}}}

    def _commit(self, name, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name]["files"][value["path"]] = self.objects[value["oid"]]
        url = f"{self.url}/{name}/commit/{'1' * 40}"
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}

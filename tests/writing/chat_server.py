"""A server on loopback that speaks OpenAI's chat completions, and answers what a test tells it to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """say: a function of a request's body that gives a text, a whole response (a mapping or bytes), or a status."""

    def __init__(self, say):
        self.say, self.bodies, self.headers, self.lock = say, [], [], threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                found = outer.say(body)
                status = found if isinstance(found, int) else 200
                if isinstance(found, str):
                    found = completion(found)
                content = found if isinstance(found, bytes) else json.dumps({} if isinstance(found, int) else found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def completion(text, finish="stop", **message):
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}], "usage": usage}

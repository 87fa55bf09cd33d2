"""An OpenAI-compatible server in a thread, which answers as a test says."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, str]  # the model's words, or a status and a body


class StubServer:
    """`reply(number, body)` says what the number-th request for a caption gets."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply], model: str = "stub") -> None:
        self.reply, self.models = reply, json.dumps({"data": [{"id": model}]})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.send(200, stub.models)
                else:
                    self.send(404, "nothing here")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.headers.append(dict(self.headers))
                    stub.in_flight += 1
                    stub.most_in_flight = max(stub.most_in_flight, stub.in_flight)
                time.sleep(0.02)
                reply = stub.reply(number, body)
                with stub.lock:
                    stub.in_flight -= 1
                if isinstance(reply, tuple):
                    self.send(*reply)
                    return
                text, cut = reply.removesuffix("|"), reply.endswith("|")
                choice = {"message": {"content": text}, "finish_reason": "length" if cut else "stop"}
                self.send(200, json.dumps({"choices": [choice]}))

            def send(self, status: int, body: str) -> None:
                with suppress(ConnectionError):  # who asked may have been killed
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

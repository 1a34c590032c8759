"""A server with good metadata that answers inference as badly as it is told to, for tests of Offload."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from featherweight.edge import protocol


class Hanging:
    """Good metadata, and answers as told: 'hang' or 'late' (inference), 'freeze' (everything), 'reset', or bytes."""

    def __init__(self, models, behaviour):
        outer = self
        self.behaviour, self.requests, self.release = behaviour, [], threading.Event()
        metadata = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}],
                    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]}  # fmt: skip
        good = protocol.write_message(
            {}, "outputs", [protocol.json_tensor("logits", np.zeros((1, 5), np.float32))]
        )[0]  # fmt: skip

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, body, status=200):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if outer.behaviour == "freeze":
                    outer.release.wait(10)
                self.answer(json.dumps({"extensions": []} if self.path == "/v2" else metadata).encode())

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                zero = not any(json.loads(body)["inputs"][0]["data"])
                if zero:  # a probe
                    return self.answer(good)
                outer.requests.append(body)
                if outer.behaviour == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                    self.close_connection = True
                    return self.connection.close()
                if outer.behaviour in ("hang", "late", "freeze"):
                    outer.release.wait(10)
                return self.answer(good if outer.behaviour in ("hang", "late", "freeze") else outer.behaviour)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        setattr(self.server, "handle_error", lambda *_: None)  # noqa: B010
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

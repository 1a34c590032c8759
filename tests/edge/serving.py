"""Small models, and a server on its own event loop in a thread, for tests of serve and Offload."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from featherweight.edge import http as blocks
from featherweight.edge.serve.app import Options, build
from featherweight.edge.serve.models import load

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL


def save(path: Path, nodes, inputs, outputs, tensors=()):
    """A model of nodes; inputs and outputs are (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in dict(tensors).items()],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def head(folder: Path) -> Path:
    """image (n, 3, 8, 8) -> features (n, 16, 8, 8), never below zero."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["features"]),
    ]
    return save(
        folder / "head.onnx",
        nodes,
        [("image", FLOAT, ["n", 3, 8, 8])],
        [("features", FLOAT, ["n", 16, 8, 8])],
        {"w": weights(16, 3, 3, 3)},
    )


TAIL = [
    helper.make_node("GlobalAveragePool", ["features"], ["p"]),
    helper.make_node("Flatten", ["p"], ["f"]),
    helper.make_node("MatMul", ["f", "v"], ["logits"]),
]


def tail(folder: Path) -> Path:
    """features -> logits (n, 5)."""
    return save(
        folder / "tail.onnx",
        TAIL,
        [("features", FLOAT, ["n", 16, 8, 8])],
        [("logits", FLOAT, ["n", 5])],
        {"v": weights(16, 5)},
    )


def whole(folder: Path, name: str = "whole", *, scale: float = 1.0) -> Path:
    """image -> logits: head and tail in one; `scale` makes a model that can be told apart from it."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["features"]),
        *TAIL,
    ]
    tensors = {"w": weights(16, 3, 3, 3), "v": scale * weights(16, 5)}
    return save(
        folder / f"{name}.onnx", nodes, [("image", FLOAT, ["n", 3, 8, 8])], [("logits", FLOAT, ["n", 5])], tensors
    )


def image(rows: int = 1, seed: int = 0):
    return weights(rows, 3, 8, 8, seed=seed)


class Server:
    """A server in a thread; `port` once started."""

    def __init__(self, models, *, token=None, tls=None, limits=None, port=0, **options):
        self.app = build(models, token=token, limits=limits, options=Options(**options))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner, self.port = self.call(blocks.start(self.app, "127.0.0.1", port, tls=tls))
        self.token = token
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def stop(self):
        if self._runner is not None:
            self.call(blocks.drain(self._runner, 5))
            self._runner = None
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            sent = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            connection.request(method, path, body, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def infer(self, model, request, headers=None):
        """Status and JSON of an inference request given as a value."""
        status, _, body = self.ask("POST", f"/v2/models/{model}/infer", json.dumps(request).encode(), headers)
        return status, json.loads(body)


@contextmanager
def serving(models, **options):
    """A running server of loaded models, or of paths."""
    loaded = [m if not isinstance(m, Path) else load(m.stem, m, threads=1) for m in models]
    server = Server(loaded, **options)
    try:
        yield server
    finally:
        server.stop()


def tensor(name, value, datatype="FP32"):
    """A JSON tensor."""
    return {"name": name, "datatype": datatype, "shape": list(value.shape), "data": value.ravel().tolist()}

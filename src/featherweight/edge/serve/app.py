"""The routes of the Open Inference Protocol over a set of models."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

from aiohttp import web

from featherweight.edge import http, wire
from featherweight.edge.http import RequestError
from featherweight.edge.protocol import (
    BINARY_EXTENSION,
    LENGTH_HEADER,
    Array,
    Given,
    Message,
    ProtocolError,
    Spec,
    json_tensor,
    pack,
    read_message,
    split_body,
    unpack,
    write_message,
)
from featherweight.edge.serve import metrics
from featherweight.edge.serve.batching import Batcher, Ran
from featherweight.edge.serve.models import VERSION, Model

OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
_INLINE_BYTES = 32 << 10
"""JSON above this is read and written in a thread, so that other requests are not held up."""
_MAX_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How requests share the machine."""

    workers: int = 1
    max_batch: int = 32
    max_delay_s: float = 0.005
    queue: int = 256
    version: str = "0"


class Service:
    """The models, their queues and the metrics. Its handlers run in one event loop."""

    def __init__(self, models: Sequence[Model], options: Options) -> None:
        self._options = options
        self._pool = ThreadPoolExecutor(options.workers * len(models), thread_name_prefix="featherweight-run")
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="featherweight-json")
        self._requests = metrics.Counter("featherweight_requests_total", "Requests answered, by status.")
        self._seconds = metrics.Histogram("featherweight_request_seconds", "From request to answer.", metrics.SECONDS)
        self._queued = metrics.Histogram("featherweight_queue_seconds", "Waited for a worker.", metrics.SECONDS)
        self._runs = metrics.Histogram("featherweight_run_seconds", "One run of the model.", metrics.SECONDS)
        self._rows = metrics.Histogram("featherweight_batch_rows", "Rows of one run.", metrics.ROWS)
        self._waiting = metrics.Gauge("featherweight_queue_length", "Requests waiting now.", self._lengths)
        self.batchers = {
            m.name: Batcher(
                m, self._pool, workers=options.workers, max_batch=options.max_batch, max_delay_s=options.max_delay_s,
                queue=options.queue, on_batch=partial(self._count_batch, m.name),
            )
            for m in models
        }  # fmt: skip

    def routes(self) -> list[web.RouteDef]:
        """Every path of the service."""
        model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        both = [
            route
            for base in (model, versioned)
            for route in (
                web.get(base, self.model_metadata),
                web.get(f"{base}/ready", self.model_ready),
                web.post(f"{base}/infer", self.infer),
            )
        ]
        return [
            web.get("/v2", self.server_metadata),
            web.get("/v2/", self.server_metadata),
            web.get("/v2/health/live", self.live),
            web.get("/v2/health/ready", self.ready),
            web.get("/metrics", self.scrape),
            web.get("/openapi.json", self.description),
            *both,
        ]

    async def live(self, _request: web.Request) -> web.Response:
        """Whether the process answers."""
        return http.json_answer({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Whether requests are taken; not while draining."""
        draining = http.state(request.app).draining
        return http.json_answer({"ready": not draining}, status=503 if draining else 200)

    async def server_metadata(self, _request: web.Request) -> web.Response:
        """Name, version, extensions."""
        return http.json_answer({
            "name": "featherweight", "version": self._options.version, "extensions": [BINARY_EXTENSION, wire.EXTENSION],
        })  # fmt: skip

    async def model_metadata(self, request: web.Request) -> web.Response:
        """Inputs and outputs of a model; open axes are -1."""
        model = self._batcher(request).model
        return http.json_answer({
            "name": model.name, "versions": [VERSION], "platform": "onnx_onnxv1",
            "inputs": [_spec(s) for s in model.inputs], "outputs": [_spec(s) for s in model.outputs],
            "parameters": {wire.EXTENSION: ",".join(wire.ENCODINGS), "batching": model.batched},
        })  # fmt: skip

    async def model_ready(self, request: web.Request) -> web.Response:
        """Whether a model takes requests."""
        return http.json_answer({"name": self._batcher(request).model.name, "ready": True})

    async def scrape(self, _request: web.Request) -> web.Response:
        """Metrics for Prometheus."""
        shown = (self._requests, self._seconds, self._queued, self._runs, self._rows, self._waiting)
        return web.Response(text=metrics.page(shown), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def description(self, _request: web.Request) -> web.Response:
        """The OpenAPI description."""
        text = resources.files("featherweight.edge.serve").joinpath("openapi.json").read_bytes()
        return web.Response(body=text, content_type="application/json")

    async def infer(self, request: web.Request) -> web.Response:
        """Run a model on the tensors of a request."""
        batcher = self._batcher(request)
        body = await http.read_body(request)
        heavy = len(body) > _INLINE_BYTES
        message, rows = await self._maybe_away(
            heavy, _read_request, batcher.model, body, request.headers.get(LENGTH_HEADER)
        )
        http.hold(request, sum(4 * math.prod(g.shape) for g in message.tensors if wire.EXTENSION in g.parameters))
        feeds = await self._maybe_away(heavy, _read_values, message)
        wanted = _wanted_outputs(message, batcher.model)
        transport = request.transport
        outputs, job = await batcher.run(
            feeds, tuple(wanted), rows, lambda: transport is None or transport.is_closing()
        )
        self._queued.add(job.waited_s, model=batcher.model.name)
        size = sum(v.nbytes for v in outputs.values())
        answer, length = await self._maybe_away(
            size > _INLINE_BYTES, _write_answer, batcher.model, message, outputs, wanted
        )
        return _answer(request, answer, length)

    def count(self, request: web.Request, status: int, seconds: float) -> None:
        """Count an answer; only known models get a label, so that strangers cannot grow the page."""
        name = request.match_info.get("model", "")
        known = name if name in self.batchers else ""
        self._requests.add(model=known, status=str(status))
        if known and request.method == "POST" and status == 200:
            self._seconds.add(seconds, model=known)

    def close(self) -> None:
        """End the threads once what runs has ended."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _batcher(self, request: web.Request) -> Batcher:
        """The queue of the model the path names. Raises RequestError(404)."""
        name, version = request.match_info["model"], request.match_info.get("version", VERSION)
        found = self.batchers.get(name)
        if found is None:
            raise RequestError(404, f"there is no model {name[:80]!r}")
        if version != VERSION:
            raise RequestError(404, f"model {name} has the version {VERSION} only, but {version[:80]!r} was asked for")
        return found

    async def _maybe_away(self, away: bool, run: Callable[..., Any], *arguments: Any) -> Any:
        """Call here, or in a thread if it takes long; what the protocol forbids is the client's error."""
        try:
            if not away:
                return run(*arguments)
            return await asyncio.get_running_loop().run_in_executor(self._readers, partial(run, *arguments))
        except ProtocolError as e:
            raise RequestError(400, str(e)) from e

    def _count_batch(self, name: str, ran: Ran) -> None:
        self._runs.add(ran.seconds, model=name)
        self._rows.add(ran.rows, model=name)

    def _lengths(self) -> list[tuple[metrics.Labels, float]]:
        return [((("model", name),), float(b.waiting)) for name, b in self.batchers.items()]


def build(
    models: Sequence[Model], *, token: str | None, limits: http.Limits | None = None, options: Options | None = None
) -> web.Application:
    """The application that serves `models`; see `edge.http.start` and `run_until_stopped` for running it."""
    service = Service(models, options or Options())
    app = http.application(token=token, limits=limits, open_paths=OPEN_PATHS)
    app.add_routes(service.routes())
    http.state(app).on_answer.append(service.count)

    async def close(_app: web.Application) -> None:
        service.close()

    app.on_cleanup.append(close)
    return app


def _spec(spec: Spec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _read_request(model: Model, body: bytes, json_length: str | None) -> tuple[Message, int]:
    """A request and its rows, names, types and shapes checked; its values are not read yet."""
    header, raw = split_body(body, json_length, http.parse_json)
    message = read_message(header, raw, "inputs")
    identity = message.header.get("id")
    if identity is not None and (not isinstance(identity, str) or len(identity) > _MAX_ID):
        raise ProtocolError(f"'id' must be text of at most {_MAX_ID} characters")
    _parameters(message.header)
    rows = model.check({g.name: (g.datatype, g.shape) for g in message.tensors})
    return message, rows


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a message or tensor; absent and null mean none. Raises RequestError(400)."""
    found = entry.get("parameters")
    if found is not None and not isinstance(found, dict):
        raise RequestError(400, "'parameters' must be an object")
    return found or {}


def _read_values(message: Message) -> dict[str, Array]:
    return {g.name: _value(g) for g in message.tensors}


def _value(given: Given) -> Array:
    encoding = given.parameters.get(wire.EXTENSION)
    if encoding is None:
        return unpack(given)
    if given.raw is None or given.datatype != "FP32" or encoding not in wire.ENCODINGS:
        raise ProtocolError(
            f"{wire.EXTENSION} must be one of {', '.join(wire.ENCODINGS)} on a binary FP32 tensor; "
            f"{given.name[:80]!r} is another"
        )
    return wire.decode(given.raw, given.shape)


def _wanted_outputs(message: Message, model: Model) -> dict[str, bool]:
    """Names of the outputs to send, each with whether as bytes. Raises RequestError(400) for one that is not there."""
    known = [o.name for o in model.outputs]
    default = _parameters(message.header).get("binary_data_output", False) is True
    listed = message.header.get("outputs")
    if listed is None or listed == []:
        return dict.fromkeys(known, default)
    if not isinstance(listed, list) or not all(isinstance(o, dict) for o in listed):
        raise RequestError(400, "'outputs' must be a list of objects with a name")
    wanted: dict[str, bool] = {}
    for entry in listed:
        name, parameters = entry.get("name"), _parameters(entry)
        if not isinstance(name, str) or name not in known:
            raise RequestError(400, f"model {model.name} has the outputs {known}, but another one was asked for")
        if name in wanted:
            raise RequestError(400, f"output {name!r} must be listed once, but is listed again")
        if "classification" in parameters:
            raise RequestError(400, "the classification extension is not offered; take the values themselves")
        wanted[name] = parameters.get("binary_data", default) is True
    return wanted


def _write_answer(
    model: Model, message: Message, outputs: dict[str, Array], wanted: dict[str, bool]
) -> tuple[bytes, int | None]:
    header: dict[str, Any] = {"model_name": model.name, "model_version": VERSION}
    if message.header.get("id") is not None:
        header["id"] = message.header["id"]
    for name in wanted:
        if name not in outputs:
            raise RequestError(422, f"the model gave no value for its optional output {name!r}")
    try:
        tensors = [pack(n, outputs[n]) if binary else json_tensor(n, outputs[n]) for n, binary in wanted.items()]
    except ProtocolError as e:
        raise RequestError(422, str(e)) from e
    return write_message(header, "outputs", tensors)


def _answer(request: web.Request, body: bytes, json_length: int | None) -> web.Response:
    headers = {"Content-Type": "application/json" if json_length is None else "application/octet-stream"}
    if json_length is not None:
        headers[LENGTH_HEADER] = str(json_length)
    given = request.headers.get("X-Request-Id", "")
    if 0 < len(given) <= _MAX_ID and given.isascii() and given.isprintable():
        headers["X-Request-Id"] = given
    return web.Response(body=body, headers=headers)

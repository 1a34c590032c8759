"""`featherweight serve` beside plain ONNX Runtime in-process and a minimal hand-written server, in closed loops.

    python -m benchmarks.serve --models FOLDER [--seconds 3] [--rounds 3]

FOLDER holds lite0.onnx and minilm.onnx (built by benchmarks/models.py). Writes results/serve.json and results/serve.md.
The load generator shares the cores with the server; rounds are interleaved, the median of the rounds is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.load import Load, closed_loop, http_client, http_request
from benchmarks.results import FOLDER, machine
from featherweight.edge import protocol
from featherweight.runtime import ort

CLIENTS = (1, 8, 64)
KINDS = ("in-process", "minimal server", "serve, no batching", "serve")
Array = Any
_HEADINGS = "| clients | | requests/s | p50 | p95 | server CPU a request | errors |"


@dataclass(frozen=True)
class Case:
    """One model and the input of one request."""

    name: str
    path: Path
    feeds: dict[str, Array]


def cases(models: Path, folder: Path) -> list[Case]:
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (1, 32))
    words = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return [
        Case("tiny", tiny(folder), {"x": rng.standard_normal((1, 16)).astype(np.float32)}),
        Case("minilm, 32 tokens", models / "minilm.onnx", words),
        Case("lite0", models / "lite0.onnx", {"image": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)}),
    ]


def tiny(folder: Path) -> Path:
    """A model that takes next to no time: what is left is the server."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.ones((16, 4), np.float32), "w")],
    )
    path = folder / "tiny.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@contextmanager
def server(kind: str, path: Path, threads: int) -> Iterator[tuple[int, psutil.Process]]:
    """A server process: its port and itself."""
    if kind == "minimal server":
        command = [sys.executable, "-m", "benchmarks.minimal_server", str(path), str(threads)]
    else:
        command = [
            sys.executable,
            "-m",
            "featherweight.cli",
            "serve",
            f"m={path}",
            "--port",
            "0",
            "--threads",
            str(threads),
        ]
        command += ["--max-batch", "1"] if kind == "serve, no batching" else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)\s*$", line)
        if found is None:
            raise RuntimeError(f"the server {kind} did not start")
        yield int(found.group(1)), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def request_of(feeds: dict[str, Array], output: str) -> bytes:
    header = {"outputs": [{"name": output, "parameters": {"binary_data": True}}]}
    body, length = protocol.write_message(header, "inputs", [protocol.pack(n, v) for n, v in feeds.items()])
    return http_request("/v2/models/m/infer", body, length)


def measure(case: Case, *, seconds: float, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one model: every kind with every number of clients."""
    session = ort.session(case.path, threads=threads)
    request = request_of(case.feeds, session.outputs[0].name)

    def local() -> tuple[Callable[[], bool], Callable[[], None]]:
        return (lambda: bool(session.run(case.feeds))), (lambda: None)

    loads: dict[tuple[str, int], list[Load]] = {}
    busy: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for kind in KINDS:
            if kind == KINDS[0]:
                for clients in CLIENTS:
                    loads.setdefault((kind, clients), []).append(closed_loop(local, clients, seconds))
                continue
            with server(kind, case.path, threads) as (port, process):
                for clients in CLIENTS:
                    before = sum(process.cpu_times()[:2])
                    one = closed_loop(lambda port=port: http_client(port, request), clients, seconds)  # type: ignore[misc]
                    loads.setdefault((kind, clients), []).append(one)
                    used_ms = 1e3 * (sum(process.cpu_times()[:2]) - before) / (len(one.times) + clients)
                    busy.setdefault((kind, clients), []).append(used_ms)
                    print(case.name, kind, clients, f"{one.per_second:.0f}/s", flush=True)
    return [
        {**_row(case.name, kind, clients, found), "server_cpu_ms": statistics.median(busy.get((kind, clients), [0.0]))}
        for (kind, clients), found in loads.items()
    ]


def _row(name: str, kind: str, clients: int, found: list[Load]) -> dict[str, Any]:
    return {
        "model": name, "kind": kind, "clients": clients, "requests": sum(len(f.times) for f in found),
        "errors": sum(f.errors for f in found),
        "per_second": statistics.median(f.per_second for f in found),
        "p50_ms": statistics.median(f.quantile_ms(0.5) for f in found),
        "p95_ms": statistics.median(f.quantile_ms(0.95) for f in found),
    }  # fmt: skip


def memory(case: Case, requests: int, threads: int) -> list[dict[str, float]]:
    """Resident bytes of the server after each tenth of `requests`, binary and JSON in turn, 8 clients."""
    name = ort.session(case.path).outputs[0].name
    binary = request_of(case.feeds, name)
    tensors = [protocol.json_tensor(n, v) for n, v in case.feeds.items()]
    plain = http_request("/v2/models/m/infer", protocol.write_message({}, "inputs", tensors)[0], None)
    rows = []
    with server("serve", case.path, threads) as (port, process):
        for step in range(10):
            for request in (binary, plain):
                found = closed_loop(lambda r=request: http_client(port, r), 8, 0, requests // 20)  # type: ignore[misc]
                if found.errors:
                    raise RuntimeError("the server refused a request")
            rows.append({"requests": (step + 1) * requests // 10, "resident_bytes": process.memory_info().rss})
    return rows


def text(raw: dict[str, Any]) -> str:
    """The tables of the results page."""
    lines = [
        "# serve: load", "", f"`{raw['command']}` on {raw['machine']['system']}, {raw['machine']['cores']} cores; the "
        f"load generator runs on the same cores. Median of {raw['rounds']} interleaved rounds of {raw['seconds']:g} s. "
        f"Each run of a model uses {raw['threads']} threads.", "",
    ]  # fmt: skip
    for name in dict.fromkeys(r["model"] for r in raw["rows"]):
        lines += [f"## {name}", "", _HEADINGS, "|---|---|---|---|---|---|---|"]
        rows = [r for r in raw["rows"] if r["model"] == name]
        for row in sorted(rows, key=lambda r: (r["clients"], KINDS.index(r["kind"]))):
            cpu = "" if row["kind"] == KINDS[0] else f"{row['server_cpu_ms']:.2f} ms"
            lines.append(
                f"| {row['clients']} | {row['kind']} | {row['per_second']:.0f} | {row['p50_ms']:.2f} ms | "
                f"{row['p95_ms']:.2f} ms | {cpu} | {row['errors']} |"
            )
        lines.append("")
    lines += ["## Overhead of one request", "", "One client, median time beyond the same run in-process:", ""]
    for name, extra in raw["overhead_ms"].items():
        lines.append(f"- {name}: " + ", ".join(f"{k} {v:.2f} ms" for k, v in extra.items()))
    flat = raw["memory"]
    told = f"over {flat[-1]['requests']} requests ({raw['memory_model']}, binary and JSON, 8 clients)"
    lines += ["", "## Memory", "", f"Resident size of the server {told}:", "", "| requests | resident |", "|---|---|"]
    lines += [f"| {r['requests']} | {r['resident_bytes'] / 1e6:.1f} MB |" for r in flat]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10_000)
    asked = parser.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        chosen = cases(asked.models, Path(folder))
        rows = [r for c in chosen for r in measure(c, seconds=asked.seconds, rounds=asked.rounds, threads=threads)]
        flat = memory(chosen[0], asked.requests, threads)
    alone = {(r["model"], r["kind"]): r["p50_ms"] for r in rows if r["clients"] == 1}
    raw = {
        "schema": 1, "kind": "serve", "command": "python -m benchmarks.serve --models FOLDER", "machine": machine(),
        "seconds": asked.seconds, "rounds": asked.rounds, "threads": threads, "rows": rows,
        "overhead_ms": {c.name: {k: alone[c.name, k] - alone[c.name, KINDS[0]] for k in KINDS[1:]} for c in chosen},
        "memory_model": chosen[0].name, "memory": flat,
    }  # fmt: skip
    (FOLDER / "serve.json").write_text(json.dumps(raw, indent=1) + "\n")
    (FOLDER / "serve.md").write_text(text(raw))
    print(text(raw))


if __name__ == "__main__":
    main()

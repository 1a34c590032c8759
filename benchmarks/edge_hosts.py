"""Placed, split, served and cut off: three hosts on this machine, each a network namespace; see netlab.py.

    python -m benchmarks.edge_hosts --models FOLDER [--profile HERE.json] [--calls 25] [--seconds 60]

FOLDER holds lite0.onnx and minilm.onnx (built by benchmarks/models.py). Needs root on Linux. First, for each placement
of each model, the latency predicted by `place` beside the measured one; then the link is cut for ten seconds under a
steady 20 requests a second. Writes results/edge_hosts.json and results/edge_hosts.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import featherweight as fw
from benchmarks.netlab import Cable, address, enter, inside, network
from benchmarks.results import FOLDER, machine
from featherweight.core import Profile
from featherweight.edge import mincut, place, split, wire
from featherweight.edge._compute import Work
from featherweight.edge.links import Link
from featherweight.edge.mincut import Cut
from featherweight.edge.placement import Load, Place, Question, Row
from featherweight.edge.prices import Offer
from featherweight.edge.profiles import measure_profile
from featherweight.edge.v2client import Connection
from featherweight.edge.ways import Ways
from featherweight.runtime import ort
from featherweight.runtime.targets import load_profile

HOSTS = ["device", "edge", "cloud"]
CABLES = [Cable("device", "edge", 50, 50, 4), Cable("device", "cloud", 20, 50, 40)]
TOKEN = "benchmark-token-0123456789"
PORT = 8000
RATE, CUT_AT, CUT_FOR = 20.0, 20.0, 10.0
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """One placement: what was predicted, and how to ask for it. `wire`: how floats travel."""

    model: str
    host: str
    kind: str
    wire: str
    predicted: Row
    head: Path | None = None
    served: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--profile", type=Path, help="of this machine, one thread; measured here if absent")
    parser.add_argument("--calls", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args()
    profile = load_profile(asked.profile) if asked.profile else measure_profile(threads=1, seconds=30)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        links = stack.enter_context(network(HOSTS, CABLES))
        ways, served = planned(asked.models, profile, Path(folder))
        small = rounded(asked.models / "lite0.onnx", Path(folder) / "lite0-8bit.onnx")
        for host in HOSTS[1:]:
            stack.enter_context(serving(host, served[host], Path(folder)))
        enter("device")
        rows = [measured(way, asked.models, asked.calls) for way in ways]
        best = next(
            w for w in ways if w.model == "lite0" and w.kind == "split" and w.host == "edge" and w.wire == "int8"
        )
        cut = cut_off(best, small, links, asked.seconds)
    raw = {
        "schema": 1, "kind": "edge_hosts", "command": "python -m benchmarks.edge_hosts --models FOLDER",
        "machine": machine(), "links": [vars(c) for c in CABLES], "placements": rows, "cut": cut,
    }  # fmt: skip
    (FOLDER / "edge_hosts.json").write_text(json.dumps(raw, indent=1) + "\n")
    (FOLDER / "edge_hosts.md").write_text(text(raw))
    print(text(raw))


def feeds_of(name: str, seed: int) -> Arrays:
    """A random photo, or 32 tokens."""
    rng = np.random.default_rng(seed)
    if name == "lite0":
        return {"image": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)}
    ids = rng.integers(1000, 20000, (1, 32))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


# Predicted


def planned(models: Path, profile: Profile, folder: Path) -> tuple[list[Way], dict[str, dict[str, Path]]]:
    """Every placement with its prediction, the halves written; and what each host must serve."""
    places = [
        Place(c.b, Offer(c.b, "owned", c.b, profile), Link(c.b, c.up_mbit_s, c.down_mbit_s, c.rtt_ms, c.rtt_ms))
        for c in CABLES
    ]
    ways: list[Way] = []
    served: dict[str, dict[str, Path]] = {p.name: {} for p in places}
    for name in ("lite0", "minilm"):
        path = models / f"{name}.onnx"
        shapes = {k: v.shape for k, v in feeds_of(name, 0).items()}
        (work,) = place.models({name: path}, input_shapes=shapes)
        for encoding in ("float32", "int8"):
            question = Question(
                [work], profile, places, Load(1000.0), wire="int8" if encoding == "int8" else "float"
            )  # fmt: skip
            for row in place.all_rows(question):
                if row.kind != "split":
                    if encoding == "float32":
                        ways.append(Way(name, row.place, row.kind, encoding, row, None, name))
                        served.get(row.place, {})[name] = path
                    continue
                cut = [w for w in row.wire if w not in shapes]
                tag = f"{name}-{row.place}-{encoding}"
                halves = split.split(path, cut, folder / tag, input_shapes=shapes)
                served[row.place][tag] = halves.tail
                ways.append(Way(name, row.place, "split", encoding, row, halves.head, tag))
            tag = f"{name}-half-{encoding}"
            half, row = in_the_middle(question, work, places[0])
            halves = split.split(path, half, folder / tag, input_shapes=shapes)
            served[row.place][tag] = halves.tail
            ways.append(Way(name, row.place, "split in the middle", encoding, row, halves.head, tag))
    return ways, served


def in_the_middle(question: Question, work: Work, where: Place) -> tuple[Cut, Row]:
    """The cut with the least on the wire among those that leave a third to two thirds of the time on either side."""
    here = place.times_on(question, work, "device", question.device)
    there = place.times_on(question, work, where.name, where.offer.profile)
    found = [mincut.wire_of(work.graph, head) for head in work.graph.linear()]
    rows = [(cut, place._row(question, work, where, cut, here, there)) for cut in found]
    fair = [(c, r) for c, r in rows if 1 / 3 <= r.device_ms / (r.device_ms + r.server_ms) <= 2 / 3]
    return min(fair, key=lambda pair: pair[0].total)


# Measured


@contextmanager
def serving(host: str, models: dict[str, Path], folder: Path) -> Iterator[None]:
    """`featherweight serve` on a host."""
    token = folder / "token"
    token.write_text(TOKEN)
    named = [f"{name}={path}" for name, path in models.items()]
    command = [sys.executable, "-m", "featherweight.cli", "serve", *named, "--host", address(HOSTS, host)]
    command += ["--port", str(PORT), "--token-file", str(token), "--threads", "1"]
    process = subprocess.Popen(inside(host, command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if process.stdout is None or not process.stdout.readline().startswith("serving"):
            raise RuntimeError(f"the server on {host} did not start")
        yield
    finally:
        process.terminate()
        process.wait(60)


def connection(host: str) -> Connection:
    return Connection(f"http://{address(HOSTS, host)}:{PORT}", token=TOKEN, plain_token=True)


def measured(way: Way, models: Path, calls: int) -> dict[str, Any]:
    """Milliseconds of calls a quarter of a second apart, as a person's requests come."""
    local = ort.session(models / f"{way.model}.onnx")
    times, sent = [], 0
    if way.kind == "device":
        for i in range(calls + 3):
            feeds = feeds_of(way.model, i)
            started = time.perf_counter()
            local.run(feeds)
            times.append(1e3 * (time.perf_counter() - started))
    else:
        mode: Any = "split" if way.head else "remote"
        link = connection(way.host)
        ways = Ways(
            link, head=ort.session(way.head) if way.head else None, tail=way.served if way.head else None,
            whole=None if way.head else way.served, local=local, encoding=way.wire,
        )  # fmt: skip
        ways.meet(mode, 10.0)
        for i in range(calls + 3):
            feeds = feeds_of(way.model, i)
            time.sleep(0.25)
            started = time.perf_counter()
            reply = ways.ask(mode, feeds, 10.0)
            times.append(1e3 * (time.perf_counter() - started))
            sent = reply.sent_bytes
        link.close()
    kept = times[3:]
    row = way.predicted
    found = {
        "model": way.model, "host": way.host, "kind": way.kind, "wire": way.wire, "after": list(row.after)[:3],
        "predicted_ms": row.mean_ms, "measured_ms": statistics.median(kept), "p95_ms": float(np.quantile(kept, 0.95)),
        "predicted_device_ms": row.device_ms, "predicted_server_ms": row.server_ms,
        "predicted_network_ms": row.up_ms + row.down_ms + row.network_ms, "predicted_up_bytes": row.up_bytes,
        "sent_bytes": sent, "calls": calls,
    }  # fmt: skip
    print(found, flush=True)
    return found


# Cut off


def rounded(path: Path, out: Path) -> Path:
    """The model with its weights rounded to 8 bits a tensor: a local model whose answers can be told apart."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim >= 2:
            step = np.abs(value).max() / 127 or 1.0
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((np.rint(value / step) * step).astype(np.float32), tensor.name)
            )
    onnx.save(model, out)
    return out


@dataclass(frozen=True)
class Asked:
    """One request of the steady stream. `at` in seconds from the start; `right`: the answer is its source's own."""

    at: float
    ms: float
    source: str
    right: bool


def cut_off(way: Way, small: Path, links: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """A steady stream of requests through Offload; the cable is cut at 20 s and joined again at 30 s."""
    assert way.head is not None
    expected = answers(way, small)
    end = CUT_AT + CUT_FOR
    with fw.Offload(
        way.head, f"http://{address(HOSTS, way.host)}:{PORT}", tail=way.served, fallback=small, wire="int8+zstd",
        token=TOKEN, plain_token=True, deadline="500ms", in_flight=16,
    ) as model:  # fmt: skip
        model.wait_until_up(10)
        time.sleep(3)
        before = ran(way)
        start = time.monotonic()
        for at, word in ((CUT_AT, "cut"), (end, "join")):
            timer = threading.Timer(at, tell, (links, f"{word} device {way.host}\n"))
            timer.daemon = True
            timer.start()
        with ThreadPoolExecutor(32, initializer=enter, initargs=("device",)) as pool:
            futures: list[Future[Asked]] = []
            for i in range(int(RATE * seconds)):
                time.sleep(max(start + i / RATE - time.monotonic(), 0.0))
                futures.append(pool.submit(one, model, i, start + i / RATE - start, start, expected))
            done = [f.result() for f in futures if f.exception() is None]
            failed = [repr(f.exception()) for f in futures if f.exception() is not None]
        stats = model.stats()
    phases = {"before": (0.0, CUT_AT), "cut": (CUT_AT, end), "after": (end, seconds)}
    return {
        "rate": RATE, "asked": len(futures), "answered": len(done), "lost": len(failed), "errors": failed[:3],
        "wrong": sum(not d.right for d in done), "phases": {n: phase(done, *span) for n, span in phases.items()},
        "back_after_s": min((d.at - end for d in done if d.at > end and d.source != "local"), default=None),
        "ran_at_server": ran(way) - before, "probes": stats.probes, "hedged": stats.hedged,
        "unanswered_by_server": stats.lost, "late": stats.late, "switches": stats.switches, "deadline_ms": 500,
        "sent_bytes": stats.sent_bytes,
    }  # fmt: skip


_PICTURES = 20


def answers(way: Way, small: Path) -> dict[tuple[str, int], Any]:
    """What each source must answer, by source and picture: the tail on the unpacked tensor, and the local model."""
    assert way.head is not None
    head, local = ort.session(way.head), ort.session(small)
    tail = ort.session(way.head.parent / split.TAIL)
    found: dict[tuple[str, int], Any] = {}
    for i in range(_PICTURES):
        feeds = feeds_of("lite0", i)
        sent = head.run({t.name: feeds[t.name] for t in head.inputs})
        packets = {n: wire.encode(v, "int8+zstd") for n, v in sent.items()}
        got = {n: sent[n] if p is None else wire.decode(p, sent[n].shape) for n, p in packets.items()}
        late = {t.name: got[t.name] if t.name in got else feeds[t.name] for t in tail.inputs}
        found["split", i] = tail.run(late)
        found["local", i] = local.run(feeds)
    return found


def one(model: fw.Offload, i: int, due: float, start: float, expected: dict[tuple[str, int], Any]) -> Asked:
    """Ask once; the time counts from when the request was due."""
    reply = model.ask(feeds_of("lite0", i % _PICTURES))
    ms = 1e3 * (time.monotonic() - start - due)
    right = expected[reply.source, i % _PICTURES]
    same: Callable[..., bool] = np.array_equal if reply.source == "local" else _close
    return Asked(due, ms, reply.source, all(same(reply.outputs[n], right[n]) for n in right))


def _close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() <= 1e-3 * np.abs(b).max())  # batches sum in another order


def phase(done: list[Asked], start: float, end: float) -> dict[str, Any]:
    these = [d for d in done if start <= d.at < end]
    if not these:
        return {"requests": 0}
    times = [d.ms for d in these]
    return {
        "requests": len(these), "p50_ms": float(np.quantile(times, 0.5)), "p95_ms": float(np.quantile(times, 0.95)),
        "most_ms": max(times), "sources": dict(Counter(d.source for d in these)),
    }  # fmt: skip


def ran(way: Way) -> int:
    """Inference requests the server has answered for this model."""
    import urllib3

    url = f"http://{address(HOSTS, way.host)}:{PORT}/metrics"
    page = urllib3.request("GET", url, headers={"Authorization": f"Bearer {TOKEN}"}).data.decode()
    found = re.search(rf'featherweight_request_seconds_count{{model="{re.escape(way.served)}"}} (\d+)', page)
    return int(found.group(1)) if found else 0


def tell(links: subprocess.Popen[str], line: str) -> None:
    assert links.stdin is not None
    links.stdin.write(line)
    links.stdin.flush()


def text(raw: dict[str, Any]) -> str:
    """The tables of the results page."""
    cables = "; ".join(
        f"{c['a']} to {c['b']} {c['up_mbit_s']:g}/{c['down_mbit_s']:g} Mbit/s, round trip {c['rtt_ms']:g} ms"
        for c in raw["links"]
    )
    lines = [
        "# Several hosts", "",
        f"`{raw['command']}` on {raw['machine']['system']}, {raw['machine']['cores']} cores shared "
        f"by all hosts and the links. {cables}. All hosts have the same processor, one thread a run.", "",
        "| model | placement | wire | predicted | measured, median | p95 | measured / predicted | bytes sent |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in raw["placements"]:
        where = (
            r["host"] if not r["kind"].startswith("split") else f"device + {r['host']}, after {', '.join(r['after'])}"
        )
        floats = r["wire"] if r["kind"].startswith("split") else ""
        lines.append(
            f"| {r['model']} | {where} | {floats} | {r['predicted_ms']:.1f} ms | "
            f"{r['measured_ms']:.1f} ms | {r['p95_ms']:.1f} ms | {r['measured_ms'] / r['predicted_ms']:.2f} | "
            f"{r['sent_bytes'] or ''} |"
        )
    cut = raw["cut"]
    back = "-" if cut["back_after_s"] is None else f"{cut['back_after_s']:.1f} s"
    lines += [
        "", "## The link cut for ten seconds", "",
        f"Lite0 split in the middle between device and edge, int8+zstd on the wire, {cut['rate']:g} requests a second, "
        f"deadline {cut['deadline_ms']} ms; the local model is the network with weights rounded to 8 bits.", "",
        f"- {cut['asked']} requests: {cut['answered']} answered, {cut['lost']} lost",
        f"- {cut['wrong']} answers that are neither exactly the local model's nor, to 0.1 %, the server's",
        f"- back at the server {back} after the link returned",
        f"- the server ran {cut['ran_at_server']} requests, at most {cut['probes']} probes among them; "
        f"{cut['unanswered_by_server']} got no answer from it, none was sent again", "",
        "| phase | requests | p50 | p95 | longest | answered by |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, p in cut["phases"].items():
        if p["requests"]:
            by = ", ".join(f"{n} {k}" for k, n in p["sources"].items())
            times = " | ".join(f"{p[k]:.1f} ms" for k in ("p50_ms", "p95_ms", "most_ms"))
            lines.append(f"| {name} | {p['requests']} | {times} | {by} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

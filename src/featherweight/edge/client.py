"""A model that runs here, there, or half here and half there, whichever works now: `Offload`. See docs/serve.md.

Each request has a deadline. While the server is awaited, the local model stands by: it starts so early that its answer
is there in time, and at once when the link is found broken; an answer that is later than usual makes us look. Exactly
one answer is returned; nothing is sent twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from featherweight.edge.access import read_token
from featherweight.edge.cache import Cache, key_of
from featherweight.edge.flight import Flight
from featherweight.edge.modes import Chooser, Mode, Prefer
from featherweight.edge.protocol import Array
from featherweight.edge.v2client import Connection, LinkError, read_url
from featherweight.edge.ways import PLAIN, Ways, checked
from featherweight.errors import BudgetError, FeatherweightError, RunError
from featherweight.quantities import parse_latency
from featherweight.runtime import ort

ModelSource = str | Path | bytes | ort.Session
Source = Literal["local", "split", "remote", "cache"]

_PROBE_MOST_S = 5.0
_STANDBY = 1.3
"""The local model starts this many times its usual duration before the deadline."""
_LOOK_S = 0.1
"""An answer is called late, and a link dead, after this time at the earliest."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: outputs by name, where it was computed, how long it took."""

    outputs: dict[str, Array]
    source: Source
    ms: float


@dataclass(slots=True)
class Stats:
    """What happened so far. `late` answers of the server came after the local one had been returned."""

    answered: dict[str, int] = field(default_factory=lambda: {"local": 0, "split": 0, "remote": 0, "cache": 0})
    hedged: int = 0
    lost: int = 0
    late: int = 0
    rejected: int = 0
    probes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    mode: str = "local"
    up: bool = False
    reason: str = ""
    switches: int = 0
    wire: str = PLAIN
    latency_ms: dict[str, float | None] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


class Offload:
    """A model behind a link that may fail.

        with fw.Offload("head.onnx", "https://edge:8000", tail="tail", fallback="small.onnx") as model:
            logits = model({"image": image})["logits"]

    Args:
        head: the part that runs here; None: the whole model runs at the server.
        url: of a server of the Open Inference Protocol v2; may end in /v2/models/NAME.
        fallback: the local model; its inputs and outputs are those of a request.
        tail: name at the server of the model that continues `head`.
        whole: name at the server of the whole model.
        deadline: time within which an answer is wanted ('500ms', or ms); the local model starts in time to keep it.
        prefer: 'server' asks it while it answers within the deadline; 'fastest' also compares with the local model, and
            starts that as soon as an answer is later than usual (hedging: Dean and Barroso 2013, "The tail at scale").
        wire: float32 tensors travel as 'float32', 'zstd', 'int8' or 'int8+zstd', if the server can unpack them.
        binary: raw tensors instead of JSON; None: if the server announces them.
        token: bearer token, or the file that holds it (a Path).
        ca: PEM file of the authorities to trust instead of the system's.
        threads: of one local run.
        in_flight: requests at the server at once; more run locally.
        cache: answers kept for repeated inputs; 0: none.
        cache_bytes, cache_ttl_s: bounds of what is kept.
        probe_s: time between looks at a link that is down; it grows to 5 s while the link stays down.
        refresh_s: time between measurements, with inputs of zeros, of ways not in use.
        plain_token: allow the token over http to another machine.

    Thread-safe. Raises RunError, ModelError or FeatherweightError for what cannot be used; a server that is away is
    no error.
    """

    def __init__(
        self, head: ModelSource | None, url: str, *, fallback: ModelSource, tail: str | None = None,
        whole: str | None = None, deadline: str | float = "1s", prefer: Prefer = "server", wire: str = PLAIN,
        binary: bool | None = None, token: str | Path | None = None, ca: Path | None = None, threads: int = 1,
        in_flight: int = 8, cache: int = 0, cache_bytes: int = 64 << 20, cache_ttl_s: float = 60.0,
        probe_s: float = 1.0, refresh_s: float = 10.0, plain_token: bool = False,
    ) -> None:  # fmt: skip
        base, named = read_url(url)
        if named is not None:
            tail, whole = (tail or named, whole) if head is not None else (tail, whole or named)
        deadline_ms, _ = parse_latency(deadline)
        if deadline_ms is None or prefer not in ("server", "fastest") or min(in_flight, threads) < 1:
            raise BudgetError(
                "deadline must be a time such as '500ms', prefer 'server' or 'fastest', in_flight and threads >= 1, "
                f"but got {deadline!r}, {prefer!r}, {in_flight} and {threads}"
            )
        self._local = _opened(fallback, threads)
        secret = read_token(token) if isinstance(token, Path) else token
        self._connection = Connection(base, token=secret, ca=ca, size=in_flight + 1, plain_token=plain_token)
        self._ways = Ways(
            self._connection, head=None if head is None else _opened(head, threads), tail=tail, whole=whole,
            local=self._local, encoding=wire, binary=binary,
        )  # fmt: skip
        self._deadline_s = deadline_ms / 1e3
        self._chooser = Chooser(("local", *self._ways.modes), self._deadline_s, prefer)
        self._cache = Cache(cache, cache_bytes, cache_ttl_s, time.monotonic) if cache > 0 else None
        self._probe_s, self._refresh_s = probe_s, refresh_s
        self._stats = Stats()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._flights: set[Flight] = set()
        self._slots = threading.Semaphore(in_flight)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="featherweight-offload")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._prefer = prefer
        self._suspected_s: float | None = None
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="featherweight-probe", daemon=True)
        self._watcher.start()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; as `ask`."""
        return self.ask(feeds).outputs

    def ask(self, feeds: Mapping[str, Array]) -> Reply:
        """Answer one request.

        Raises DataError for inputs the model does not take; RunError if neither the local model nor the server can
        run them.
        """
        if self._closing.is_set():
            raise FeatherweightError("this Offload is closed; make a new one")
        started = time.monotonic()
        given = checked(feeds, self._local.inputs)
        with self._lock:
            mode = self._chooser.choose(started)
            self._shapes = {n: a.shape for n, a in given.items()}
        key = None if self._cache is None else key_of(given)
        if self._cache is not None and key is not None:
            kept = self._cache.get(key, lambda source: source != "local" or mode == "local")
            if kept is not None:
                return self._finish(kept[0], "cache", started)
        source: Source = "local"
        if mode != "local" and self._slots.acquire(blocking=False):
            outputs, source = self._race(mode, given, started)
        else:
            outputs = self._run_local(given)
        if self._cache is not None and key is not None:
            self._cache.put(key, outputs, source)
        return self._finish(outputs, source, started)

    def stats(self) -> Stats:
        """A copy of the counters, and the present state of the link."""
        with self._lock:
            now, chooser = self._stats, self._chooser
            return Stats(
                dict(now.answered), now.hedged, now.lost, now.late, now.rejected, now.probes, now.sent_bytes,
                now.received_bytes, chooser.mode, chooser.up, chooser.reason, chooser.switches, self._ways.encoding,
                {m: None if t.mean_s is None else 1e3 * t.mean_s for m, t in chooser.tracks.items()},
                {m: t.loss for m, t in chooser.tracks.items()},
            )  # fmt: skip

    def wait_until_up(self, seconds: float) -> bool:
        """Wait until the server has been reached. False if it was not within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._chooser.up or self._closing.is_set(), seconds)

    def close(self) -> None:
        """Stop probing, let requests in progress end, close all connections."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(wait=True)
        self._watcher.join()
        self._connection.close()

    def _finish(self, outputs: dict[str, Array], source: Source, started: float) -> Reply:
        with self._lock:
            self._stats.answered[source] += 1
        return Reply(outputs, source, 1e3 * (time.monotonic() - started))

    def _run_local(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        started = time.monotonic()
        outputs = self._local.run(feeds)
        with self._lock:
            self._chooser.took("local", time.monotonic() - started)
        return outputs

    def _race(self, mode: Mode, feeds: dict[str, Array], started: float) -> tuple[dict[str, Array], Source]:
        """The server's answer, or the local one if that is late. A slot is held until the server's part is over."""
        flight = Flight()
        with self._lock:
            self._flights.add(flight)
            usual_s, wait_s = self._patience_s(mode)
        try:
            self._pool.submit(self._travel, mode, feeds, flight, started)
        except RuntimeError:  # closed in the meantime
            self._slots.release()
            return self._run_local(feeds), "local"
        outputs = flight.wait(started + min(usual_s, wait_s) - time.monotonic())
        if outputs is None and self._suspect(usual_s):
            outputs = flight.wait(started + wait_s - time.monotonic())
        if outputs is not None:
            return outputs, mode
        with self._lock:
            self._stats.hedged += 1
        try:
            own = self._run_local(feeds)
        except RunError as e:
            outputs = flight.last_chance(started + self._deadline_s - time.monotonic())
            if outputs is None:
                raise RunError(f"{e}; and the server gave no answer in time ({flight.error or 'timeout'})") from e
            return outputs, mode
        outputs = flight.settle()
        return (own, "local") if outputs is None else (outputs, mode)

    def _patience_s(self, mode: Mode) -> tuple[float, float]:
        """Seconds until an answer of the server is late, and until the local model must start."""
        there, here = self._chooser.tracks[mode], self._chooser.tracks["local"]
        late_s = max((there.mean_s or self._deadline_s) + 4 * there.deviation_s, _LOOK_S)
        latest_s = self._deadline_s - _STANDBY * here.late_s()
        return late_s, min(late_s, latest_s) if self._prefer == "fastest" else latest_s

    def _suspect(self, usual_s: float) -> bool:
        """An answer is late: have the link looked at. False if it is known to be down already."""
        with self._changed:
            self._suspected_s = usual_s
            self._changed.notify_all()
            return self._chooser.up

    def _travel(self, mode: Mode, feeds: dict[str, Array], flight: Flight, started: float) -> None:
        """Ask the server, in a thread of the pool."""
        try:
            reply = self._ways.ask(mode, feeds, max(started + self._deadline_s - time.monotonic(), 0.001))
        except Exception as e:
            flight.fail(e)
            self._failed(mode, e)
        else:
            wanted = flight.answer(reply.outputs)
            with self._lock:
                self._chooser.took(mode, time.monotonic() - started)
                self._stats.late += not wanted
                self._stats.sent_bytes += reply.sent_bytes
                self._stats.received_bytes += reply.received_bytes
        finally:
            with self._lock:
                self._flights.discard(flight)
            self._slots.release()

    def _failed(self, mode: Mode, e: Exception) -> None:
        """Count a request that the server did not answer; if the link is down, nobody waits for it any longer."""
        kind = e.kind if isinstance(e, LinkError) else "protocol"
        with self._lock:
            if kind == "rejected" or isinstance(e, RunError):
                self._stats.rejected += 1  # these inputs are wrong, which says nothing of the link
                return
            self._stats.lost += 1
            self._chooser.failed(mode, kind=kind, reason=str(e))
        self._hurry_if_down()

    def _hurry_if_down(self) -> None:
        """If the link is down, nobody waits for it any longer, and its connections are of no use."""
        with self._changed:
            waiting = tuple(self._flights)
            self._changed.notify_all()
            if self._chooser.up:
                return
        for flight in waiting:
            flight.hurry()
        self._connection.close()

    def _watch(self) -> None:
        """Measure the local model, then look at the link: often while it is down, else seldom or when in doubt."""
        self._measure_local()
        pause_s, refreshed = 0.0, float("-inf")
        while not self._closing.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._closing.is_set() or self._suspected_s is not None, pause_s)
                suspected_s, self._suspected_s = self._suspected_s, None
                up, mode = self._chooser.up, self._chooser.mode
            if self._closing.is_set():
                return
            if up and suspected_s is not None:
                self._look(suspected_s)
                continue
            if up and time.monotonic() - refreshed < self._refresh_s:
                pause_s = self._probe_s
                continue
            idle = tuple(m for m in self._ways.modes if m != mode or not up)
            good = self._probe(idle) if idle else True
            if good:
                refreshed = time.monotonic()
                pause_s = self._probe_s / 4
            else:
                pause_s = min(max(1.25 * pause_s, self._probe_s), _PROBE_MOST_S)

    def _look(self, usual_s: float) -> None:
        """Ask a server whose answer is late for its health; if that does not come either, the link is down."""
        try:
            self._connection.ready(usual_s)
        except LinkError as e:
            if e.kind in ("connect", "lost", "timeout"):
                with self._lock:
                    self._chooser.down(str(e))
                self._hurry_if_down()

    def _measure_local(self) -> None:
        for _ in range(3):
            with self._lock:
                shapes = dict(self._shapes)
            try:
                self._run_local(self._ways.zeros(shapes))
            except RunError:
                return  # zeros do not suit this model; real requests will tell

    def _probe(self, modes: tuple[Mode, ...]) -> bool:
        """Measure `modes` with inputs of zeros. A model that is missing closes its way, not the link."""
        with self._lock:
            feeds = self._ways.zeros(self._shapes)
            self._stats.probes += 1
        times: dict[Mode, float] = {}
        failure: Exception | None = None
        try:
            self._connection.ready(self._deadline_s)
            for mode in modes:
                try:
                    times[mode] = self._time_one(mode, feeds)
                except FeatherweightError as e:
                    if isinstance(e, LinkError) and e.kind in ("connect", "lost", "timeout"):
                        raise
                    failure = e
        except LinkError as e:
            failure, times = e, {}
        with self._changed:
            if times:
                self._chooser.probed(times)
            elif not self._chooser.up:
                self._chooser.down(str(failure))
            self._changed.notify_all()
        if failure is not None:
            self._connection.close()
        return bool(times)

    def _time_one(self, mode: Mode, feeds: dict[str, Array]) -> float:
        """Seconds of one request of zeros; of a question for health where the model refuses zeros."""
        self._ways.meet(mode, self._deadline_s)
        started = time.monotonic()
        try:
            self._ways.ask(mode, feeds, self._deadline_s)
        except (LinkError, RunError) as e:
            if isinstance(e, LinkError) and e.kind != "rejected":
                raise
            started = time.monotonic()
            self._connection.ready(self._deadline_s)
        return time.monotonic() - started


def _opened(model: ModelSource, threads: int) -> ort.Session:
    return model if isinstance(model, ort.Session) else ort.session(model, threads=threads)

"""Two models side by side on the same data, whoever made them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight import data as fwdata
from featherweight.core import Measurement, Note
from featherweight.errors import DataError, ModelError
from featherweight.graph import io
from featherweight.runtime import evaluate as ev
from featherweight.runtime import significance
from featherweight.runtime.bench import Bench, Here
from featherweight.runtime.sandbox import Worker
from featherweight.search.baseline import LATENCY_FEEDS
from featherweight.search.problem import first_feeds, input_specs


@dataclass(frozen=True)
class Comparison:
    """Both measurements (`candidate.drop` is paired with the original's samples) and why this metric."""

    original: Measurement
    candidate: Measurement
    metric_reason: str
    notes: tuple[Note, ...] = ()


def compare(
    original: str | Path,
    candidate: str | Path,
    data: Any,
    *,
    metric: str | None = None,
    preprocess: Any = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 1,
    threads: int = 1,
    seed: int = 0,
    bench: Bench | None = None,
) -> Comparison:
    """Measure two models on the same data: metric with a paired test, bytes, latency interleaved, memory, load time.

    `bench` is where they run; None: this machine.
    Raises ModelError if the two do not take the same inputs, DataError for unusable data, RunError if one fails.
    """
    paths = (Path(original), Path(candidate))
    specs = [input_specs(io.load(p)) for p in paths]
    names = [sorted(s.name for s in spec) for spec in specs]
    if names[0] != names[1]:
        raise ModelError(f"two models must take the same inputs to be compared, but got {names[0]} and {names[1]}")
    opened = fwdata.open_data(data, specs[0], preprocess=preprocess, tokenizer=tokenizer, batch_size=batch_size)
    if opened.n_batches == 0:
        raise DataError(f"the data is empty: {opened.source} has no batch")
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder, Worker() as worker:
        work = Path(folder)
        read = fwdata.spool(opened, work / "data", inputs=specs[0])
        chosen, why = ev.pick_metric(paths[0], read, metric, worker=worker)
        bench = bench or Here(worker)
        before = bench.evaluate(paths[0], read, chosen, record_to=work / "reference", threads=threads)
        after = bench.evaluate(paths[1], read, chosen, reference=work / "reference", threads=threads)
        feeds = first_feeds(read, LATENCY_FEEDS)
        timing = bench.latency(*paths, feeds, threads=threads)
        memories = [bench.memory(p, feeds[0]) for p in paths]
    drop = significance.paired(chosen, before, after, seed=seed)
    shared: dict[str, Any] = {
        "metric_name": chosen.name,
        "n_samples": after.n_samples,
        "runtime": bench.runtime,
        "host": bench.host,
        "seed": seed,
    }
    first = Measurement(
        io.size_bytes(paths[0]), metric=chosen.perfect if chosen.perfect is not None else before.value, drop=0.0,
        latency_ms=timing.original_ms, p95_ms=timing.original_p95_ms, latency_ratio=1.0,
        peak_bytes=memories[0].peak_bytes, load_ms=memories[0].load_ms, **shared,
    )  # fmt: skip
    second = Measurement(
        io.size_bytes(paths[1]), metric=after.value, drop=drop.value, drop_interval=drop.interval, p_value=drop.p_value,
        latency_ms=timing.candidate_ms, p95_ms=timing.candidate_p95_ms, latency_ratio=timing.ratio,
        peak_bytes=memories[1].peak_bytes, load_ms=memories[1].load_ms, **shared,
    )  # fmt: skip
    return Comparison(first, second, why, (*opened.notes, *bench.notes()))

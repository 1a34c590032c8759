"""One streaming pass over the calibration data: run the model in the child process, sum what techniques need."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.errors import DataError
from featherweight.stats import folding, padding
from featherweight.stats.accumulate import Moments
from featherweight.stats.reads import Read, Tables, reads_of, rows_of
from featherweight.stats.statistics import MomentStats, Statistics, ValueStats
from featherweight.stats.values import ValueSummary

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
LARGEST_K = 4096  # longer rows keep only the diagonal: k x k float64 would pass 128 MiB a weight


def model_key(model: ir.Model) -> str:
    """sha256 over nodes, names and weight bytes: equal models give equal keys, whatever file they came from."""
    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(f"{value.name}:{value.shape}:{value.dtype}".encode())
        if value.const_value is not None:
            digest.update(value.const_value.tobytes())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        ins = [v.name if v is not None else "" for v in node.inputs]
        attributes = sorted(f"{a.name}={a.value}" for a in node.attributes.values() if a.type != ir.AttributeType.GRAPH)
        digest.update(f"{node.op_type}{ins}{[v.name for v in node.outputs]}{attributes}".encode())
    return digest.hexdigest()


def collect(
    model: ir.Model,
    dataset: Any,
    weights: Sequence[Weight] | None = None,
    *,
    worker: Any = None,
    moments: bool = True,
    values: bool = True,
    max_positions: int = 256,
    threads: int = 2,
    seed: int = 0,
    timeout_s: float | None = None,
) -> Statistics:
    """Read calibration statistics of `model` from `dataset` in one pass; memory does not grow with its length.

    Args:
        dataset: something with `batches()`, each with `feeds` by input name and `n` samples, or a list of feeds.
        weights: of `graph.weights.weights(model)`; None lists them here.
        model: the normalised model; not changed.
        worker: a running `runtime.sandbox.Worker`; None starts one for this call.
        moments, values: whether second moments of weight inputs, and activation summaries, are wanted.
        max_positions: rows drawn of each sample and layer for the second moments.
        threads: of the runtime in the child.
        seed: of the drawing of positions.
        timeout_s: for the whole pass; None waits.

    Raises:
        DataError: the dataset has no batch.
        RunError, ChildCrashed: the model fails or dies on the data.
    """
    from featherweight.graph import io
    from featherweight.graph import weights as graph_weights

    listed = list(graph_weights.weights(model)) if weights is None else list(weights)
    reads, notes = reads_of(listed) if moments else ([], [])
    tables = Tables.of(listed)
    axes = value_axes(model) if values else {}
    job = (reads, tables, axes, max_positions, threads, seed)
    with tempfile.TemporaryDirectory(prefix="featherweight-stats-") as folder:
        path = Path(folder) / "instrumented.onnx"
        wanted = {name for read in reads for name in read.values} | set(tables.values) | set(axes)
        io.save(instrumented(model, wanted), path)
        parts = _run(worker, path, dataset, job, timeout_s)
    second, summaries, counts, samples = parts
    if samples == 0:
        raise DataError("calibration needs at least one batch, but the dataset is empty; give it data")
    return Statistics(model_key(model), samples, seed, second, summaries, counts, tuple(notes))


def _run(worker: Any, path: Path, dataset: Any, job: Any, timeout_s: float | None) -> Any:
    if worker is not None:
        return worker.call(stream, str(path), dataset, *job, timeout_s=timeout_s)
    from featherweight.runtime.sandbox import Worker

    with Worker() as own:
        return own.call(stream, str(path), dataset, *job, timeout_s=timeout_s)


def instrumented(model: ir.Model, wanted: set[str]) -> ir.Model:
    """A copy of `model` that also puts out the values named in `wanted` (those of the top-level graph)."""
    copy = model.clone()
    present = {v.name for v in copy.graph.outputs} | {v.name for v in copy.graph.inputs}
    for node in copy.graph:
        for value in node.outputs:
            if value.name in wanted and value.name not in present:
                value.shape = None  # stored shapes may be stale; the runtime infers its own
                copy.graph.outputs.append(value)
    return copy


def value_axes(model: ir.Model) -> dict[str, int]:
    """Channel axis (1 or -1) of every float activation that is worth a summary.

    Convolutional neighbours mean axis 1, everything else the last axis. Values that only feed a Relu or Clip are
    left out: that node is folded into the rounding.
    """
    outputs = {v.name for v in model.graph.outputs}
    spatial: set[str] = set()
    for node in model.graph:
        if node.op_type in CONVOLUTIONAL:
            spatial.update(v.name for v in (*node.inputs[:1], *node.outputs[:1]) if v is not None and v.name)
    # Elementwise nodes carry the axis on; two sweeps reach both up- and downstream neighbours.
    for nodes in (list(model.graph), list(reversed(list(model.graph)))):
        for node in nodes:
            if node.op_type in ELEMENTWISE:
                names = {v.name for v in (*node.inputs, *node.outputs) if v is not None and v.name}
                if names & spatial:
                    spatial |= names
    axes = {}
    for value in _activations(model):
        readers = list(value.uses())
        maker = value.producer()
        folded = (
            len(readers) == 1
            and readers[0].idx == 0
            and value.name not in outputs
            and maker is not None
            and maker.op_type in folding.ROUNDED
            and folding.folds(readers[0].node) is not None
        )
        if value.name and not folded:
            axes[value.name] = 1 if value.name in spatial else -1
    return axes


CONVOLUTIONAL = frozenset(
    {
        "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "MaxPool",
        "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "DepthToSpace", "SpaceToDepth", "LRN",
    }
)  # fmt: skip
ELEMENTWISE = frozenset(
    {
        "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Add", "Sub",
        "Mul", "Div", "Concat", "Pad", "Identity", "Dropout", "Erf", "Gelu", "Softplus", "Mish",
    }
)  # fmt: skip


def _activations(model: ir.Model) -> Iterator[ir.Value]:
    for value in model.graph.inputs:
        if value.dtype in FLOATS:
            yield value
    for node in model.graph:
        if node.op_type in ("Constant", "DequantizeLinear", "QuantizeLinear"):
            continue
        for value in node.outputs:
            # A value without a type (behind an op unknown to shape inference) is read if it turns out float.
            if value.name and (value.dtype is None or value.dtype in FLOATS):
                yield value


def stream(
    path: str,
    dataset: Any,
    reads: list[Read],
    tables: Tables,
    axes: dict[str, int],
    max_positions: int,
    threads: int,
    seed: int,
) -> tuple[dict[str, MomentStats], dict[str, ValueStats], dict[str, Any], int]:
    """In the child: run every batch and accumulate. Returns moments, values, gather counts, number of samples."""
    from featherweight.runtime import ort

    rng = np.random.default_rng(seed)
    session = ort.session(path, threads=threads)
    sums: dict[str, Moments] = {}
    summaries = {name: ValueSummary(axis) for name, axis in axes.items()}
    counts = tables.zeros()
    samples = 0
    for got, n in _run_ahead(session, dataset):
        samples += n
        mask = padding.shown(got)
        for read in reads:
            _accumulate(sums, read, got, max_positions, rng, mask)
        for name, summary in summaries.items():
            x = got.get(name)
            if x is not None and x.dtype.kind == "f":
                real = padding.rows_shown(x.shape, mask) if summary.axis == -1 else None
                summary.add(x, rng, real)
        tables.add(counts, got)
    return _moments(sums), _summaries(summaries), counts, samples


def _run_ahead(session: Any, dataset: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Inputs and outputs of each batch with its samples; the next batch runs while this one is summed up."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[Mapping[str, Any], int, Future[dict[str, Any]]] | None = None
        for feeds, n in _batches(dataset):
            started = (feeds, n, pool.submit(session.run, feeds))
            if waiting is not None:
                yield {**waiting[0], **waiting[2].result()}, waiting[1]
            waiting = started
        if waiting is not None:
            yield {**waiting[0], **waiting[2].result()}, waiting[1]


def _batches(dataset: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    items = dataset.batches() if hasattr(dataset, "batches") else dataset
    for item in items:
        if isinstance(item, Mapping):
            yield item, max((int(np.shape(v)[0]) for v in item.values() if np.ndim(v)), default=1)
        else:
            yield item.feeds, item.n


def _accumulate(
    sums: dict[str, Moments],
    read: Read,
    got: dict[str, Any],
    limit: int,
    rng: np.random.Generator,
    mask: npt.NDArray[np.bool_] | None,
) -> None:
    rows = rows_of(read, got, limit=limit, rng=rng, mask=mask)
    if rows is None or not rows.size:
        return
    groups, _, k = rows.shape
    found = sums.get(read.weight)
    if found is None:
        found = sums[read.weight] = Moments(groups, k, diagonal=k > LARGEST_K)
    if (found.groups, found.k) == (groups, k):
        found.add(rows)


def _moments(sums: dict[str, Moments]) -> dict[str, MomentStats]:
    """Means of the sums; each sum is freed as it is read, since all of them together are the largest thing here."""
    found = {}
    for name in list(sums):
        m = sums.pop(name)
        m.flush()
        if m.rows:
            m.total /= m.rows
            found[name] = MomentStats(m.total, m.first / m.rows, m.rows)
    return found


def _summaries(found: dict[str, ValueSummary]) -> dict[str, ValueStats]:
    out = {}
    for name, s in found.items():
        if s.count == 0 or s.channel_low is None or s.channel_high is None or s.channel_sum is None:
            continue
        rows = s.reservoir.rows() if s.reservoir is not None else np.zeros((0, len(s.channel_low)), np.float32)
        out[name] = ValueStats(
            low=s.low,
            high=s.high,
            finite=s.finite,
            row_span=s.row_span,
            axis=s.axis,
            shape=s.shape,
            channel_low=np.asarray(s.channel_low, np.float32),
            channel_high=np.asarray(s.channel_high, np.float32),
            channel_mean=(s.channel_sum / s.count).astype(np.float32),
            bin_low=s.histogram.low,
            bin_width=s.histogram.width,
            counts=s.histogram.counts,
            rows=rows,
        )
    return out


Runner = Callable[[ir.Model, Sequence[Mapping[str, Any]]], list[dict[str, Any]]]

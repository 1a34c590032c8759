"""Calibration statistics as data: what `collect` returns, saved to and read from one npz file (docs/formats.md)."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.errors import DataError
from featherweight.stats.accumulate import BINS, F32, F64

SCHEMA = 1


@dataclass(frozen=True)
class ValueStats:
    """One activation over all calibration batches.

    `low`, `high`: exact extremes of its finite values. `finite` False: a NaN or infinity was seen. `row_span`: the
    largest quotient of two samples' greatest |x| inside one batch. `axis`: the channel axis (1 or -1). `channel_*`
    (channels,) float32. `rows` (n, channels) float32: a uniform sample of positions. `counts` (BINS,) over equal
    bins of `bin_width` from `bin_low`, of a sample of positions. `shape`: of the last batch.
    """

    low: float
    high: float
    finite: bool
    row_span: float
    axis: int
    shape: tuple[int, ...]
    channel_low: F32
    channel_high: F32
    channel_mean: F32
    bin_low: float
    bin_width: float
    counts: npt.NDArray[np.int64]
    rows: F32

    def scaled(self, factor: F32) -> ValueStats:
        """The same activation with channel c multiplied by `factor[c]` > 0; the histogram is remade from rows."""
        rows = self.rows * factor
        low, high = self.channel_low * factor, self.channel_high * factor
        top = max(float(np.abs(rows).max(initial=0.0)), 1e-30) * (1 + 1e-6)
        counts, edges = np.histogram(rows, bins=BINS, range=(-top if low.min() < 0 else 0.0, top))
        return dataclasses.replace(
            self,
            low=float(low.min()),
            high=float(high.max()),
            channel_low=low,
            channel_high=high,
            channel_mean=self.channel_mean * factor,
            bin_low=float(edges[0]),
            bin_width=float(edges[1] - edges[0]),
            counts=counts.astype(np.int64),
            rows=rows,
        )


@dataclass(frozen=True)
class MomentStats:
    """E[x x^T] (groups, k, k), or its diagonal (groups, k) for very long rows, and E[x] (groups, k), float64."""

    second: F64
    mean: F64
    rows: int


@dataclass(frozen=True)
class Statistics:
    """Statistics of one model. `key` says which (see `featherweight.stats.model_key`); use them on no other."""

    key: str
    n_samples: int
    seed: int
    moments: dict[str, MomentStats] = field(default_factory=dict)
    values: dict[str, ValueStats] = field(default_factory=dict)
    row_counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def second_moment(self, weight: str) -> F64 | None:
        """E[x x^T] (groups, k, k) in the order of Weight.to_matrix; (groups, k) is its diagonal; None if not read."""
        found = self.moments.get(weight)
        return found.second if found and found.rows else None

    def mean(self, weight: str) -> F64 | None:
        """E[x] (groups, k) of the rows that `weight` multiplies, or None if not read."""
        found = self.moments.get(weight)
        return found.mean if found and found.rows else None

    def n_rows(self, weight: str) -> int:
        """How many rows the second moment of `weight` is the mean of."""
        found = self.moments.get(weight)
        return found.rows if found else 0

    def range(self, value: str) -> tuple[float, float] | None:
        """(least, greatest) finite value of an activation, or None if it was not read."""
        found = self.values.get(value)
        return (found.low, found.high) if found and found.low <= found.high else None

    def histogram(self, value: str) -> tuple[npt.NDArray[np.int64], F64] | None:
        """(counts (bins,), edges (bins + 1,)) of an activation, or None if it was not read."""
        found = self.values.get(value)
        if found is None:
            return None
        edges = found.bin_low + found.bin_width * np.arange(len(found.counts) + 1, dtype=np.float64)
        return found.counts, edges.astype(np.float64)

    def gather_counts(self, weight: str) -> npt.NDArray[np.int64] | None:
        """How often each row (rows,) of a Gather table was looked up, or None."""
        return self.row_counts.get(weight)

    def save(self, path: str | Path) -> None:
        """Write one npz file, readable without pickle: moments as float32 triangles, sampled rows as float16."""
        arrays: dict[str, Any] = {}
        meta: dict[str, Any] = {
            "schema": SCHEMA,
            "key": self.key,
            "n_samples": self.n_samples,
            "seed": self.seed,
            "notes": [[n.where, n.text] for n in self.notes],
            "moments": {},
            "values": {},
            "row_counts": list(self.row_counts),
        }
        for i, (name, m) in enumerate(self.moments.items()):
            meta["moments"][name] = m.rows
            arrays[f"m{i}_second"], arrays[f"m{i}_mean"] = packed(m.second), m.mean
        for i, (name, v) in enumerate(self.values.items()):
            fields = dataclasses.asdict(v)
            for part in _ARRAYS:
                arrays[f"v{i}_{part}"] = fields.pop(part)
            # Sampled rows choose ranges: eleven bits of each value are plenty. Scaled, so that none overflows.
            fields["rows_scale"] = scale = max(float(np.abs(v.rows).max(initial=0.0)), 1e-30)
            arrays[f"v{i}_rows"] = (v.rows / np.float32(scale)).astype(np.float16)
            meta["values"][name] = fields
        for i, counts in enumerate(self.row_counts.values()):
            arrays[f"g{i}"] = counts
        np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read `save`'s file. Raises DataError if it is not one."""
        try:
            with np.load(path, allow_pickle=False) as raw:
                return _from_npz(raw)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
            raise DataError(f"{path} must be a statistics file of schema {SCHEMA}, but cannot be read: {e}") from e


def packed(second: F64) -> npt.NDArray[np.float32]:
    """(groups, k, k) symmetric -> upper triangle (groups, k (k + 1) / 2) float32; a diagonal (groups, k) as it is."""
    if second.ndim == 2:
        return second.astype(np.float32)
    rows, columns = np.triu_indices(second.shape[-1])
    return second[:, rows, columns].astype(np.float32)


def unpacked(stored: npt.NDArray[np.float32], k: int) -> F64:
    """Inverse of `packed` up to its rounding, float64."""
    if stored.shape[-1] == k and k != 1:
        return stored.astype(np.float64)
    rows, columns = np.triu_indices(k)
    full = np.empty((stored.shape[0], k, k), np.float64)
    full[:, rows, columns] = stored
    full[:, columns, rows] = stored
    return full


_ARRAYS = ("channel_low", "channel_high", "channel_mean", "counts", "rows")


def _from_npz(raw: Any) -> Statistics:
    meta = json.loads(raw["meta"].tobytes().decode())
    if meta["schema"] != SCHEMA:
        raise ValueError(f"schema is {meta['schema']}")
    moments = {
        name: MomentStats(unpacked(raw[f"m{i}_second"], raw[f"m{i}_mean"].shape[-1]), raw[f"m{i}_mean"], int(rows))
        for i, (name, rows) in enumerate(meta["moments"].items())
    }
    values = {}
    for i, (name, fields) in enumerate(meta["values"].items()):
        fields["shape"] = tuple(fields["shape"])
        scale = np.float32(fields.pop("rows_scale"))
        parts = {part: raw[f"v{i}_{part}"] for part in _ARRAYS}
        parts["rows"] = parts["rows"].astype(np.float32) * scale
        values[name] = ValueStats(**fields, **parts)
    return Statistics(
        key=meta["key"],
        n_samples=meta["n_samples"],
        seed=meta["seed"],
        moments=moments,
        values=values,
        row_counts={name: raw[f"g{i}"] for i, name in enumerate(meta["row_counts"])},
        notes=tuple(Note(*n) for n in meta["notes"]),
    )

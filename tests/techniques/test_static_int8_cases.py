"""The plain int8 model on small models that broke public tools: right in the runtime's real kernels."""

import json

import numpy as np
import pytest

from featherweight.core import Profile
from featherweight.graph import io
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import quantize_model
from featherweight.techniques._protocol import Context


class InProcess:
    def call(self, func, *args, timeout_s=None):
        return func(*args)


def runner(model, feeds):
    session = ort.session(io.to_bytes(model))
    return [session.run(f) for f in feeds]


def calibration(path):
    batches: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as raw:
        for key in raw.files:
            number, name = key.split("::")
            batches.setdefault(int(number), {})[name] = raw[key]
    return [batches[n] for n in sorted(batches)]


def worst_db(expected, got, *, by_row: bool) -> float:
    worst = np.inf
    for name, e in expected.items():
        if e.dtype.kind != "f":
            continue
        assert got[name].shape == e.shape
        rows = zip(e, got[name], strict=True) if by_row else [(e, got[name])]
        for a, b in rows:
            seen = np.isfinite(a)
            power = np.square(a[seen], dtype=np.float64).sum()
            error = np.square(a[seen] - b[seen].astype(np.float64)).sum()
            if error > 0:
                worst = min(worst, 10 * np.log10(power / error) if power > 0 else -np.inf)
    return float(worst)


@pytest.mark.slow
@pytest.mark.parametrize("int8_dot", [False, True])
def test_int8_cases_meet_their_bounds(cases_dir, int8_dot):
    misses = []
    for case in json.loads((cases_dir / "index.json").read_text()):
        bound = case["oracle"].get("int8")
        if bound is None:
            continue
        name = case["name"]
        inputs = dict(np.load(cases_dir / f"{name}.inputs.npz"))
        expected = dict(np.load(cases_dir / f"{name}.expected.npz"))
        batches = calibration(cases_dir / f"{name}.calib.npz")
        model = normalise(io.load(cases_dir / f"{name}.onnx"), run=runner, feeds=[inputs]).model
        stats = collect(model, batches, worker=InProcess(), threads=1)
        ctx = Context(Profile("p", "x86_64", 1, 1 << 33, int8_dot), stats)
        quantized, _ = quantize_model(model, stats, ctx, runner=runner, feeds=batches)
        found = worst_db(expected, runner(quantized, [inputs])[0], by_row="rows" in name)
        if found < bound["min_sqnr_db"]:
            misses.append(f"{name}: {found:.1f} dB, bound {bound['min_sqnr_db']}")
    assert not misses

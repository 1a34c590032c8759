"""What a right result is: cases read from a folder, noise at the outputs in dB, the model's interface."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One model of the shared folder with its data and machine-readable right answer."""

    name: str
    folder: Path
    facts: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / f"{self.name}.onnx"

    @property
    def data(self) -> Path:
        return self.folder / f"{self.name}.calib.npz"

    @property
    def oracle(self) -> Mapping[str, Any]:
        return self.facts.get("oracle") or {}

    @property
    def inputs(self) -> Arrays:
        return load(self.folder / f"{self.name}.inputs.npz")

    @property
    def expected(self) -> Arrays:
        return load(self.folder / f"{self.name}.expected.npz")

    @property
    def batches(self) -> list[Arrays]:
        found: dict[int, Arrays] = {}
        for key, array in load(self.data).items():
            number, name = key.split("::", 1)
            found.setdefault(int(number), {})[name] = array
        return [found[n] for n in sorted(found)]

    @property
    def files(self) -> dict[str, bytes]:
        """All files of the case, to see that none is touched."""
        return {p.name: p.read_bytes() for p in self.folder.glob(f"{self.name}.*")}


def load(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as raw:
        return {k: raw[k] for k in raw.files}


def shared_cases() -> list[Case]:
    """Every case that lies in the folder now; none where there is no folder (tests skip then, see conftest)."""
    named = os.environ.get("FEATHERWEIGHT_SHARED")
    folder = (Path(named) if named else Path(__file__).resolve().parents[3] / "shared") / "cases"
    found = [(p, json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))]
    return [Case(p.stem, folder, facts) for p, facts in found if isinstance(facts, dict) and "oracle" in facts]


def run(model: Path | bytes, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Outputs by name, on the runtime as a user would load the file."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def worst_db(expected: Arrays, got: Arrays, blocks: Mapping[str, Any] | None = None) -> float:
    """Lowest signal-to-noise ratio over float outputs; `blocks` {output: {axis, blocks}} are judged one by one."""
    worst = np.inf
    for name, e in expected.items():
        g = got[name]
        assert g.shape == e.shape, f"{name}: shape {g.shape}, was {e.shape}"
        assert g.dtype == e.dtype, f"{name}: type {g.dtype}, was {e.dtype}"
        if e.dtype.kind != "f":
            continue
        parts: list[Any] = [...]
        apart = (blocks or {}).get(name)
        if apart is not None:
            before = (slice(None),) * apart["axis"]
            parts = [(*before, slice(*block)) for block in apart["blocks"]]
        worst = min(worst, *(_db(e[p].astype(np.float64), g[p].astype(np.float64)) for p in parts))
    return float(worst)


def _db(e: np.ndarray, g: np.ndarray) -> float:
    seen = np.isfinite(e)
    if not np.array_equal(e[~seen], g[~seen], equal_nan=True):
        return -np.inf
    power, error = np.square(e[seen]).sum(), np.square(e[seen] - g[seen]).sum()
    if error == 0:
        return np.inf
    return float(10 * np.log10(power / error)) if power > 0 and np.isfinite(error) else -np.inf


def assert_same_interface(before: Path, after: Path) -> None:
    """Names, types and declared shapes of inputs and outputs are as they were; shapes may be known better."""
    old, new = (onnx.load(p, load_external_data=False).graph for p in (before, after))
    stored = {t.name for t in old.initializer}
    for was, now in (
        ([v for v in old.input if v.name not in stored], [v for v in new.input if v.name not in stored]),
        (old.output, new.output),
    ):
        assert [v.name for v in now] == [v.name for v in was]
        for a, b in zip(was, now, strict=True):
            assert a.type.tensor_type.elem_type == b.type.tensor_type.elem_type, a.name
            assert _dims(b) == _dims(a) or not a.type.tensor_type.HasField("shape"), a.name


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]


def bytes_on_disk(model: Path) -> int:
    """The file and its side files."""
    proto = onnx.load(model, load_external_data=False)
    sides = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return model.stat().st_size + sum((model.parent / s).stat().st_size for s in sides)

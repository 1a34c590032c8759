"""Run one other tool on one model: `python -m benchmarks.peer TOOL NAME MODEL FOLDER OUTPUT`.

It runs in the tool's own environment, where featherweight is not installed. FOLDER: prepared calibration data.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import feeds

ORT_STATIC: dict[str, dict[str, Any]] = {
    "ort-static": {},
    "ort-static-per-channel": {"per_channel": True},
    "ort-static-reduce-range": {"per_channel": True, "reduce_range": True},
}
ORT_DYNAMIC: dict[str, dict[str, Any]] = {
    "ort-dynamic": {},
    "ort-dynamic-per-channel": {"per_channel": True},
}
NNCF: dict[str, dict[str, Any]] = {"nncf": {}, "nncf-transformer": {"transformer": True}}
TOOLS = {**ORT_STATIC, **ORT_DYNAMIC, **NNCF}


class _Reader:
    """onnxruntime's CalibrationDataReader by shape."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        raise NotImplementedError("ranges of batches are not asked for")

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._batches

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def __len__(self) -> int:
        return 0


def ort_static(name: str, model: Path, calibration: Path, out: Path, options: dict[str, Any]) -> None:
    """quantize_static after the pre-processing its documentation asks for; all else at its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Reader)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, out, _Reader(feeds.read(calibration, name)), **options)


def ort_dynamic(model: Path, out: Path, options: dict[str, Any]) -> None:
    """quantize_dynamic at its defaults, but for `options`."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model, out, **options)


def nncf_ptq(name: str, model: Path, calibration: Path, out: Path, *, transformer: bool = False) -> None:
    """nncf.quantize at its defaults (300 calibration items)."""
    import nncf
    import onnx

    options = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    items = list(feeds.read(calibration, name, limit=300))
    quantized = nncf.quantize(onnx.load(model), nncf.Dataset(items), **options)
    onnx.save(quantized, out)


def main(tool: str, name: str, model: Path, calibration: Path, out: Path) -> None:
    """Write OUTPUT with TOOL, or fail with the tool's own error."""
    if tool in ORT_STATIC:
        ort_static(name, model, calibration, out, ORT_STATIC[tool])
    elif tool in ORT_DYNAMIC:
        ort_dynamic(model, out, ORT_DYNAMIC[tool])
    else:
        nncf_ptq(name, model, calibration, out, **NNCF[tool])


if __name__ == "__main__":
    if len(sys.argv) != 6 or sys.argv[1] not in TOOLS:
        raise SystemExit(f"{__doc__}\nTOOL: {', '.join(TOOLS)}")
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))

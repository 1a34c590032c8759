"""Whole runs on small hostile models made here: the interface kept, nothing grown, the outputs within a bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import featherweight as fw
from e2e import kinds
from e2e.judging import assert_same_interface, run, worst_db

QUICK = (
    "gru_reset_before", "if_inside_loop_captured_weight", "opset8_old_forms", "input_is_output", "extreme_weights",
    "weight_also_used_as_data", "float16_model", "string_input", "many_outputs_inner_scalar_integer", "odd_names",
)  # fmt: skip


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in kinds.KINDS])
def test_a_whole_run_gets_it_right(name: str, tmp_path: Path) -> None:
    made = kinds.write(name, tmp_path)
    before, expected = made.model.read_bytes(), run(made.model, made.inputs)
    report = fw.compress(made.model, made.data, out=tmp_path / "run")
    assert report.ok, report.reason
    assert made.model.read_bytes() == before
    result = tmp_path / "run" / "model.onnx"
    assert result.stat().st_size == report.result.size_bytes <= len(before)
    assert_same_interface(made.model, result)
    got = run(result, made.inputs)
    assert list(got) == list(expected)
    assert worst_db(expected, got) >= kinds.KINDS[name].least_db
    for key, value in expected.items():
        if value.dtype.kind in "OUS":
            assert np.array_equal(got[key], value)
    for layer in report.layers:
        assert layer["int8"] or layer["why"]

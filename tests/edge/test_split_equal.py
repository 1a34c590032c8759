"""Head and tail, run one after the other, equal the whole: every cut of small graphs, many of real ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.edge import cuts, mincut, split
from featherweight.errors import ModelError
from featherweight.graph import io
from featherweight.runtime import ort

Arrays = dict[str, Any]


def run_split(prepared: ir.Model, graph: cuts.CutGraph, cut: mincut.Cut, feeds: Arrays) -> Arrays:
    head, tail, given = split.halves(prepared, graph, cut)
    here = {k: v for k, v in feeds.items() if k in {i.name for i in head.graph.inputs}}
    first = ort.session(io.to_bytes(head)).run(here)
    wire = [graph.tensors[t] for t in cut.wire]
    passed = {t.name: feeds[t.name] if t.is_input else first[t.name] for t in wire}
    assert {i.name for i in tail.graph.inputs} == set(passed)
    assert {o.name for o in head.graph.outputs} == {t.name for t in wire if not t.is_input} | {
        n for n, side in given.items() if side == "head"
    }
    second = ort.session(io.to_bytes(tail)).run(passed)
    return {n: first[n] if side == "head" else second[n] for n, side in given.items()}


def check_all(path: Path, feeds: Arrays, *, atol: float, most: int = 300, every: int = 1) -> int:
    prepared = cuts.prepare(io.load(path))
    graph = cuts.cut_graph(prepared, input_shapes={k: v.shape for k, v in feeds.items()})
    expected = ort.session(path).run(feeds)
    try:
        heads = list(graph.downsets(most))
    except ModelError:
        heads = list(graph.linear())[::every]
    for head in heads:
        got = run_split(prepared, graph, mincut.wire_of(graph, head), feeds)
        assert set(got) == set(expected)
        for name, want in expected.items():
            assert (got[name].dtype, got[name].shape) == (want.dtype, want.shape), name
            if want.dtype.kind in "fc":
                bound = atol * max(1.0, float(np.nanmax(np.abs(want), initial=0.0)))
                np.testing.assert_allclose(got[name], want, rtol=0, atol=bound, err_msg=f"{path.name} {sorted(head)}")
            else:
                np.testing.assert_array_equal(got[name], want)
    return len(heads)


def case_feeds(cases: Path, name: str) -> Arrays:
    with np.load(cases / f"{name}.inputs.npz") as npz:
        return {k: npz[k] for k in npz.files}


def runnable(cases: Path) -> list[str]:
    index = json.loads((cases / "index.json").read_text())
    return [c["name"] for c in index if c["runs"] and c["expects"] != "clear error"]


@pytest.mark.parametrize("name", ["model_local_function", "second_input_enters_late"])
def test_every_cut_of_the_split_cases(cases_dir: Path, name: str) -> None:
    assert check_all(cases_dir / f"{name}.onnx", case_feeds(cases_dir, name), atol=1e-5) >= 3


@pytest.mark.slow
def test_every_cut_of_every_case_that_runs(cases_dir: Path) -> None:
    failures = []
    for name in runnable(cases_dir):
        try:
            check_all(cases_dir / f"{name}.onnx", case_feeds(cases_dir, name), atol=1e-4, every=1)
        except Exception as e:  # every failure is listed
            failures.append(f"{name}: {type(e).__name__} {str(e)[:300]}")
    assert not failures, "\n".join(failures)


REAL = {
    "lite0": {"image": ((2, 3, 224, 224), "float32")},
    "resemblyzer": {"mels": ((2, 160, 40), "float32")},
    "ppocr_rec": {"x": ((1, 3, 48, 160), "float32")},
    "mobilenetv2": {"image": ((1, 3, 224, 224), "float32")},
}


def real_model(name: str) -> Path:
    folder = os.environ.get("FEATHERWEIGHT_MODELS")
    path = Path(folder or "") / f"{name}.onnx"
    if not folder or not path.is_file():
        pytest.skip("set FEATHERWEIGHT_MODELS to a folder of real models (benchmarks/models.py makes them)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REAL))
def test_real_networks_equal_at_cuts_of_the_stored_order(name: str) -> None:
    rng = np.random.default_rng(0)
    feeds = {k: rng.normal(size=shape).astype(dtype) for k, (shape, dtype) in REAL[name].items()}
    every = 5 if name == "ppocr_rec" else 1
    assert check_all(real_model(name), feeds, atol=1e-4, most=20, every=every) > 9


@pytest.mark.slow
def test_a_text_encoder_equals_at_every_second_cut() -> None:
    rng = np.random.default_rng(0)
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    feeds = {
        "input_ids": rng.integers(1000, 9000, size=(2, 12)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((2, 12), np.int64),
    }
    assert check_all(real_model("minilm"), feeds, atol=1e-4, most=20, every=2) > 100

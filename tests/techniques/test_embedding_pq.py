"""embedding_pq holds the contract of all techniques, and its own promises."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.core import Action, Profile
from featherweight.errors import TechniqueError
from featherweight.graph import encode, io
from featherweight.runtime import ort
from featherweight.techniques import Context, get
from featherweight.techniques.embedding_pq import coded_table
from featherweight.testing.contract import TechniqueContract

PQ = get("embedding_pq")


class TestEmbeddingPq(TechniqueContract):
    technique = "embedding_pq"
    plain_per_channel = False


def context() -> Context:
    return Context(profile=Profile("test", "x86_64", 1, 1 << 33, int8_dot=False))


def table_model(table: np.ndarray, *, tied: bool = False) -> ir.Model:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"], name="take")]
    if tied:
        nodes.append(helper.make_node("Gemm", ["e", "table"], ["y"], transB=1, name="score"))
    out = "y" if tied else "e"
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", None])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )


def drawn(rows: int, columns: int = 24) -> np.ndarray:
    rng = np.random.default_rng(rows)
    made = (rng.standard_normal((rows, columns)) * np.geomspace(1, 0.1, columns)).astype(np.float32)
    made[[0, rows // 2]] = 0
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [3000, 1500])
def test_bytes_and_noise_are_as_estimated(rows: int, tied: bool) -> None:
    table = drawn(rows)
    model, ctx = table_model(table, tied=tied), context()
    whole = len(io.to_bytes(model))
    [site] = PQ.sites(model)
    seen = 0
    for action in PQ.options(model, site, ctx):
        estimate = PQ.estimate(model, site, action, ctx)
        built = table_model(table, tied=tied)
        PQ.apply(built, site, action, ctx)
        saved = io.to_bytes(built)
        assert abs(len(saved) - (whole - table.nbytes + estimate.size_bytes)) < 1800
        out = ort.session(saved).run({"ids": np.arange(rows)})
        reference = ort.session(io.to_bytes(model)).run({"ids": np.arange(rows)})
        if not tied:
            error = np.square(out["e"] - reference["e"]).sum()
            noise = error / np.square(table - table.mean(axis=0)).sum()
            assert noise == pytest.approx(estimate.noise, rel=0.35)
            assert not out["e"][[0, rows // 2]].any()
        seen += 1
    assert seen >= 2


def test_frequent_rows_are_kept_best() -> None:
    table = np.random.default_rng(0).standard_normal((2000, 8)).astype(np.float32)
    use = np.ones(2000)
    use[:50] = 1000
    codes, books = coded_table(table, use, width=4, bits=5)
    decoded = encode.decode(encode.product(codes, books, 5))
    error = np.square(table - decoded).sum(axis=1)
    assert error[:50].mean() < 0.5 * error[50:].mean()


def test_small_tables_and_other_weights_are_left_alone() -> None:
    assert not list(PQ.sites(table_model(drawn(40))))
    model, ctx = table_model(drawn(100)), context()
    [site] = PQ.sites(model)
    assert not list(PQ.options(model, site, ctx))
    assert "too few rows" in ctx.notes[0].text
    with pytest.raises(TechniqueError, match="width must divide the 24 columns"):
        PQ.estimate(model, site, Action.of("embedding_pq", width=5, bits=8), ctx)

"""Rows of padding are told from rows of tokens, and neither moments nor solved weights see them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from featherweight.stats import collect, padding

MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int64)


def test_tokens_are_shown_and_padding_is_not():
    assert padding.shown({"input_ids": MASK, "attention_mask": MASK}).tolist() == MASK.astype(bool).tolist()
    assert padding.shown({"input_mask": MASK.astype(np.int32)}) is not None


@pytest.mark.parametrize(
    "feeds",
    [
        {"input_ids": MASK},
        {"attention_mask": MASK * 2},
        {"attention_mask": MASK * 0},
        {"attention_mask": MASK.astype(np.float32)},
        {"attention_mask": MASK[0]},
        {"attention_mask": MASK, "decoder_input_ids": MASK},
    ],
)
def test_where_nothing_is_said_all_places_count(feeds):
    assert padding.shown(feeds) is None


def test_rows_of_real_places_by_their_number():
    mask = MASK.astype(bool)
    assert padding.rows_shown((2, 4, 7), mask).tolist() == [0, 1, 2, 4, 5]
    assert padding.rows_shown((2, 7), mask) is None  # no axis of places
    assert padding.rows_shown((2, 3, 7), mask) is None  # of another length
    assert padding.rows_shown((2, 4, 7), np.ones((2, 4), bool)) is None
    assert padding.rows_shown((4, 4, 7), np.tri(4, dtype=bool)) is None  # places and samples cannot be told apart


def test_second_moments_are_those_of_the_tokens():
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[B, T, 3] x, int64[B, T] attention_mask) => (float[B, T, 2] y, int64[B, T] m)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) m = Identity(attention_mask) }""")
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    x[MASK == 0] = 1e3
    stats = collect(model, [{"x": x, "attention_mask": MASK}])
    real = x[MASK == 1].astype(np.float64)
    assert stats.second_moment("w")[0] == pytest.approx(real.T @ real / 5, rel=1e-5)


def test_ranges_and_histograms_are_those_of_the_tokens():
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[B, T, 3] x, int64[B, T] attention_mask) => (float[B, T, 3] y, int64[B, T] m)
        { y = Mul(x, x) m = Identity(attention_mask) }""")
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    x[0, MASK[0] == 0], x[1, MASK[1] == 0] = 1e2, 1e3
    found = collect(model, [{"x": x, "attention_mask": MASK}]).values["y"]
    real = (x * x)[MASK == 1]
    assert (found.low, found.high) == (real.min(), real.max())
    assert found.channel_mean == pytest.approx(real.mean(axis=0), rel=1e-5)
    assert found.counts.sum() == real.size
    assert found.rows.shape == (5, 3)
    assert found.row_span == pytest.approx(100)  # a scale set by the runtime sees the padding too

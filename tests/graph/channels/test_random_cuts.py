"""Cut model == masked model, over random networks of every supported construct and any share of channels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featherweight.graph import channels as ch
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from graph.channels.masking import chosen, masked
from graph.channels.random_graphs import IMAGE_BLOCKS, TOKEN_BLOCKS, build

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
images = st.lists(st.sampled_from(sorted(IMAGE_BLOCKS)), min_size=1, max_size=5)
tokens = st.lists(st.sampled_from(sorted(TOKEN_BLOCKS)), min_size=1, max_size=3)


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    return ort.session(io.to_bytes(model)).run(feed)["y"]


def compare(names: list[str], seed: int, ratio: float) -> int:
    """Cut a share of the channels and compare with zeros in their place; returns how many slots went."""
    original, feed = build(names, seed)
    model = normalise(original, run=None).model
    work = surgery.copy_model(model)
    found = ch.analyse(work)
    removed = chosen(found, ratio, np.random.default_rng(seed))
    if not removed:
        return 0
    expected = run(masked(work, found, removed), feed)
    ch.cut(found, removed)
    got = run(work, feed)
    assert got.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1.0)
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-5)
    for samples in ([0], [1, 0, 1]):  # the sizes of the analysis must not have found their way into the model
        again = run(work, {"x": feed["x"][samples]})
        np.testing.assert_allclose(again / scale, got[samples] / scale, atol=2e-5)
    stored = [sum(v.const_value.nbytes for v in m.graph.initializers.values() if v.const_value) for m in (model, work)]
    assert stored[1] < stored[0]
    return len(removed)


@pytest.mark.parametrize("block", [*IMAGE_BLOCKS, *TOKEN_BLOCKS])
def test_each_construct_alone(block: str) -> None:
    went = [compare([block], seed, ratio) for seed, ratio in enumerate(RATIOS)]
    assert max(went) > 0, "at least the layer in front of the construct, or one inside it, can lose channels"


@given(names=st.one_of(images, tokens), seed=st.integers(0, 10**6), ratio=st.sampled_from(RATIOS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_composition(names: list[str], seed: int, ratio: float) -> None:
    compare(names, seed, ratio)


@pytest.mark.slow
@given(names=st.one_of(images, tokens), seed=st.integers(0, 10**6), ratio=st.sampled_from(RATIOS))
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_many_compositions(names: list[str], seed: int, ratio: float) -> None:
    compare(names, seed, ratio)

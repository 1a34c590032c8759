"""Error-compensated rounding against brute force, plain rounding and its own promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import TechniqueError
from featherweight.techniques import _gptq, _scales


def problem(seed: int, g: int, out: int, k: int, *, rows: int = 400, rank: int | None = None):
    """Heavy-tailed weights and the second moments of correlated inputs of different scale."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(5, (g, out, k)) * 0.1).astype(np.float32)
    mix = rng.normal(size=(g, rank or max(k // 3, 1), k))
    x = rng.normal(size=(g, rows, mix.shape[1])) @ mix
    if rank is None:
        x += 0.3 * rng.normal(size=(g, rows, k))
    x *= np.exp(rng.normal(size=(g, 1, k)))
    return w, np.einsum("gnk,gnl->gkl", x, x) / rows


def output_error(w: np.ndarray, c: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """tr(dw C dw^T) of each row, written as a loop in float64: the independent oracle."""
    d = w.astype(np.float64) - decoded
    return np.array([[row @ c[g] @ row for row in d[g]] for g in range(len(w))])


def rounded_to_nearest(w: np.ndarray, bits: int) -> np.ndarray:
    """Plain per-channel symmetric rounding over the whole range."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(w).max(axis=2, keepdims=True) / top
    scale[scale == 0] = 1
    return np.clip(np.rint(w / scale), -top, top) * scale


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("shape", [(1, 12, 20), (40, 1, 9), (3, 5, 17)])
def test_error_is_what_the_codes_give_and_beats_plain_rounding(bits, shape):
    w, c = problem(bits, *shape)
    q = _gptq.quantize(w, c, bits=bits)
    truth = output_error(w, c, q.decoded())
    np.testing.assert_allclose(q.row_error, truth, rtol=2e-3, atol=1e-7 * truth.max())
    total = np.einsum("gok,gkl,gol->", w, c, w)
    assert q.error == pytest.approx(truth.sum() / total, rel=2e-3)
    plain = output_error(w, c, rounded_to_nearest(w, bits))
    assert (truth <= plain * (1 + 1e-5)).all()
    assert truth.sum() < 0.6 * plain.sum()


def test_close_to_brute_force_on_tiny_problems():
    ratios = []
    for seed in range(25):
        w, c = problem(seed, 1, 1, 5)
        q = _gptq.quantize(w, c, bits=2, damp=1e-6)
        scale = float(q.scale[0, 0])
        every = np.array(list(itertools.product(range(-2, 2), repeat=5))) * scale
        best = min((w[0, 0] - row) @ c[0] @ (w[0, 0] - row) for row in every)
        found = output_error(w, c, q.decoded())[0, 0]
        assert found >= best * (1 - 1e-5)
        ratios.append(found / best)
    assert np.median(ratios) == pytest.approx(1.0, abs=1e-5)
    assert np.mean(ratios) < 1.25


def test_feedback_factor_rebuilds_its_matrix():
    _, c = problem(0, 2, 1, 7)
    u = _gptq.feedback_factor(c)
    assert (np.tril(u) == 0).all()
    unit = u + np.eye(7)
    middle = np.linalg.inv(unit) @ c @ np.linalg.inv(unit).transpose(0, 2, 1)
    off = middle - np.einsum("gii->gi", middle)[:, :, None] * np.eye(7)
    assert np.abs(off).max() < 1e-4 * np.abs(c).max()


def test_coordinate_descent_never_raises_the_error():
    w, c = problem(4, 1, 30, 40)
    errors = [_gptq.quantize(w, c, bits=3, sweeps=s, damp=1e-6).error for s in range(5)]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("k", [1, 2, 7, 32])
def test_pair_safe_codes_hold_the_limit_in_the_given_order(k):
    w, c = problem(k, 2, 6, k)
    order = np.random.default_rng(k).permutation(k)
    q = _gptq.quantize(w, c, bits=8, pair_safe=True, reduction_order=order)
    codes = np.abs(q.codes[..., order].astype(int))
    both = codes[..., 0 : k // 2 * 2 : 2] + codes[..., 1::2]
    assert both.max(initial=0) <= 127
    free = _gptq.quantize(w, c, bits=8)
    assert free.error <= q.error <= 16 * max(free.error, 1e-7)


def test_pair_safe_beats_half_range():
    w, c = problem(9, 1, 40, 64)
    half = output_error(w, c, rounded_to_nearest(w, 7)).sum()
    paired = _gptq.quantize(w, c, bits=8, pair_safe=True)
    assert output_error(w, c, paired.decoded()).sum() < 0.25 * half


@pytest.mark.parametrize("block", [4, 8])
def test_block_scales_have_one_value_a_block_and_help(block):
    w, c = problem(1, 1, 10, 30)
    q = _gptq.quantize(w, c, bits=3, block=block)
    assert q.scale.shape == (1, 10, -(-30 // block))
    assert q.error < _gptq.quantize(w, c, bits=3).error
    np.testing.assert_allclose(q.row_error, output_error(w, c, q.decoded()), rtol=2e-3)


def test_zero_point_helps_one_sided_weights():
    w, c = problem(2, 1, 10, 20)
    w = np.abs(w)
    q = _gptq.quantize(w, c, bits=3, symmetric=False)
    assert q.zero_point is not None
    assert q.error < _gptq.quantize(w, c, bits=3).error


def test_zero_channels_and_zero_weights_stay_exact():
    w, c = problem(3, 2, 4, 12)
    w[:, 1] = 0
    w[:, 2, 5] = 0
    for options in ({}, {"block": 4}, {"symmetric": False}, {"pair_safe": True, "bits": 8}):
        q = _gptq.quantize(w, c, **{"bits": 3, **options})
        assert (q.decoded()[w == 0] == 0).all()
        assert np.isfinite(q.scale).all()
        assert (q.scale > 0).all()
    assert (_gptq.quantize(w, c, bits=3).scale[:, 1] == 1).all()


def test_dead_inputs_and_few_rows_are_harmless():
    w, c = problem(5, 1, 8, 40, rank=3)
    c[:, 7] = c[:, :, 7] = 0
    q = _gptq.quantize(w, c, bits=4)
    assert np.isfinite(q.decoded()).all()
    assert np.abs(q.decoded() - w)[..., 7].max() < np.abs(w).max() / 7
    nothing = _gptq.quantize(w, np.zeros_like(c), bits=4)
    assert nothing.error == 0
    assert np.abs(nothing.decoded() - w).max() < np.abs(w).max() / 3


def test_given_scale_is_kept():
    w, c = problem(6, 1, 8, 16)
    scale = (np.abs(w).max(axis=2) / 50).astype(np.float32)
    codes, kept = _gptq.quantize_matrix(w, c, bits=7, scale=scale)
    np.testing.assert_array_equal(kept, scale)
    assert codes.dtype == np.int8
    assert codes.min() >= -64


def test_without_moments_each_weight_is_rounded_alone():
    w, c = problem(7, 1, 6, 16)
    q = _gptq.quantize(w, None, bits=4)
    np.testing.assert_array_equal(q.codes[0], np.clip(np.rint(w[0] / q.scale[0][:, None]), -8, 7))
    diagonal = np.einsum("gii->gi", c)
    weighted = _gptq.quantize(w, diagonal, bits=4)
    spread = [((w - x.decoded()) ** 2 * diagonal[:, None]).sum() for x in (q, weighted)]
    assert spread[1] <= spread[0]


def test_bad_arguments_say_the_law():
    w, c = problem(8, 1, 2, 4)
    with pytest.raises(TechniqueError, match=r"bits must be 2..8, but got 1; 1 bit needs a palette"):
        _gptq.quantize(w, c, bits=1)
    with pytest.raises(TechniqueError, match="second moments must be finite"):
        _gptq.quantize(w, np.full_like(c, np.nan), bits=4)
    broken = w.copy()
    broken[0, 0, 0] = np.inf
    with pytest.raises(TechniqueError, match="weights must be finite, but 1 of 8"):
        _gptq.quantize(broken, c, bits=4)
    with pytest.raises(TechniqueError, match=r"second moments must be \(1, 4, 4\)"):
        _gptq.quantize(w, c[:, :3, :3], bits=4)
    with pytest.raises(TechniqueError, match="scale must be finite, > 0"):
        _gptq.quantize(w, c, bits=4, scale=np.zeros((1, 2), np.float32))
    with pytest.raises(TechniqueError, match=r"permutation of 0..3"):
        _gptq.quantize(w, c, bits=8, pair_safe=True, reduction_order=np.zeros(4, int))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    g=st.integers(1, 3),
    out=st.integers(1, 5),
    k=st.integers(1, 12),
    bits=st.integers(2, 8),
    block=st.sampled_from([0, 0, 3, 4]),
    exponent=st.integers(-20, 20),
)
def test_any_shape_and_magnitude_gives_legal_codes(seed, g, out, k, bits, block, exponent):
    w, c = problem(seed, g, out, k, rows=5)
    w *= np.float32(10.0**exponent)
    q = _gptq.quantize(w, c, bits=bits, block=block)
    low, high = _scales.code_range(bits)
    assert q.codes.min() >= low
    assert q.codes.max() <= high
    assert (np.isfinite(q.scale) & (q.scale > 0)).all()
    assert q.codes.shape == w.shape
    plain = output_error(w, c, rounded_to_nearest(w, bits)).sum()
    assert output_error(w, c, q.decoded()).sum() <= plain * (1 + 1e-3) + 1e-30

"""Sparse weights: brute-force OBS on tiny matrices, patterns, zeros, the contract."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core import Action
from featherweight.errors import TechniqueError
from featherweight.graph import encode, surgery
from featherweight.graph.weights import weights
from featherweight.techniques import _sparse, get
from featherweight.testing import graphs
from featherweight.testing.contract import TechniqueContract, Trial, context, prepared, stored_weight

Array = np.ndarray


class TestSparse(TechniqueContract):
    technique = "sparse"
    most_options = 10

    def test_rounding_is_no_worse_than_plain(self, model: str) -> None:
        """No weight is further off than zeroing as many by magnitude and rounding the rest, both plainly."""
        for t in self._trials(model):
            found = noises(t, model)
            # With a bias the mean error is free, without one it is not: both errors are lower, or the one that counts.
            assert not found or any(n <= 1.02 * plain + 1e-6 for n, plain in found), f"{t}: {found}"


def noises(t: Trial, model: str) -> list[tuple[float, float]]:
    """Output error of the weight in the file, and of magnitude pruning and rounding with a scale a row; about the mean
    and about zero.
    """
    small, stats, _ = prepared(model)
    weight = next(w for w in weights(small.model) if w.name == t.site.name)
    second, mean = stats.second_moment(weight.name), stats.mean(weight.name)
    stored = stored_weight(t.saved, weight.name)
    if second is None or mean is None or stored is None or second.ndim != 3 or t.action.get("pattern"):
        return []
    W = weight.to_matrix(weight.array()).astype(float)
    limit = np.sort(np.abs(W), axis=None)[round(t.action.get("sparsity") * W.size) - 1]
    other = np.where(np.abs(W) > limit, W, 0)
    if t.action.get("bits") != 32:
        step = np.abs(W).max(axis=2, keepdims=True) / (2 ** (t.action.get("bits") - 1) - 1)
        step = np.where(step > 0, step, 1)
        other = np.rint(other / step) * step
    spread = second - mean[:, :, None] * mean[:, None, :]
    whole = np.einsum("gok,gkl,gol->", W, spread, W)
    changes = (W - weight.to_matrix(stored), W - other)
    pairs = [[np.einsum("gok,gkl,gol->", E, m, E) / whole for E in changes] for m in (spread, second)]
    return [(float(a), float(b)) for a, b in pairs] if whole > 0 else []


def case(seed: int, out: int, k: int, groups: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, 60, k)) @ (np.eye(k) + 0.25 * rng.standard_normal((k, k)))
    W = rng.standard_normal((groups, out, k)).astype(np.float32)
    return W, x.transpose(0, 2, 1) @ x / 60


def error_of(W: Array, values: Array, C: Array) -> float:
    E = (W - values).astype(float)
    return float(np.einsum("gok,gkl,gol->", E, C, E))


def best_on(W: Array, C: Array, mask: Array) -> float:
    """Least error with these weights kept, by solving each row."""
    total = 0.0
    for g, o in itertools.product(*map(range, W.shape[:2])):
        keep, w = mask[g, o], W[g, o].astype(float)
        gone = ~keep
        schur = C[g][np.ix_(gone, gone)]
        if keep.any():
            cross = C[g][np.ix_(gone, keep)]
            schur = schur - cross @ np.linalg.solve(C[g][np.ix_(keep, keep)], cross.T)
        total += float(w[gone] @ schur @ w[gone])
    return total


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([1, 2]))
def test_kept_weights_are_the_best_for_their_mask(seed: int, sparsity: float, groups: int) -> None:
    W, C = case(seed, 6, 8, groups)
    found = _sparse.prune(W, C, sparsity=sparsity, damp=1e-6)
    assert np.count_nonzero(~found.mask) == round(sparsity * W.size)
    best = best_on(W, C, found.mask)
    assert error_of(W, found.values, C) == pytest.approx(best, rel=0.1)
    assert found.error == pytest.approx(error_of(W, found.values, C) / error_of(W, 0 * W, C), rel=1e-3)


def test_the_mask_is_near_the_best_of_all_masks() -> None:
    """One row of six weights: the error found against all choices of three zeros, each solved exactly."""
    ratios = []
    for seed in range(12):
        W, C = case(seed, 1, 6)
        found = error_of(W, _sparse.prune(W, C, sparsity=0.5, damp=1e-6).values, C)
        masks = [~np.isin(np.arange(6), gone)[None, None] for gone in itertools.combinations(range(6), 3)]
        ratios.append(found / min(best_on(W, C, mask) for mask in masks))
    assert min(ratios) > 0.999
    assert np.median(ratios) < 1.6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.6, 0.9]), st.booleans())
def test_it_is_never_worse_than_magnitude_without_compensation(seed: int, sparsity: float, near: bool) -> None:
    W, C = case(seed, 5, 12)
    if near:  # two inputs nearly the same, one dead
        C[:, 3] = C[:, 2]
        C[:, :, 3] = C[:, :, 2]
        C[:, 5], C[:, :, 5] = 0, 0
    found = _sparse.prune(W, C, sparsity=sparsity)
    order = np.argsort(np.abs(W), axis=None)
    plain = W.copy().reshape(-1)
    plain[order[: round(sparsity * W.size)]] = 0
    assert error_of(W, found.values, C) <= error_of(W, plain.reshape(W.shape), C) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("k", [16, 18])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 3)])
def test_an_nm_pattern_holds_in_every_group(k: int, pattern: tuple[int, int]) -> None:
    W, C = case(1, 7, k)
    kept, of = pattern
    for second in (C, np.einsum("gii->gi", C), None):
        found = _sparse.prune(W, second, sparsity=0.0, pattern=_sparse.Pattern(kept, of))
        for start in range(0, k, of):
            counts = (found.values[..., start : start + of] != 0).sum(axis=2)
            assert (counts == min(kept, k - start)).all()


def test_zeros_stay_zero_and_are_the_first_to_go() -> None:
    W, C = case(2, 6, 10)
    W[:, :, 4] = 0
    W[:, 3] = 0
    found = _sparse.prune(W, C, sparsity=0.5)
    assert not found.values[W == 0].any()
    assert np.count_nonzero(found.values) == 30


def test_without_moments_it_is_magnitude_pruning() -> None:
    W, C = case(3, 6, 10)
    found = _sparse.prune(W, None, sparsity=0.4)
    limit = np.sort(np.abs(W), axis=None)[23]
    np.testing.assert_array_equal(found.values, np.where(np.abs(W) > limit, W, 0))
    diagonal = np.einsum("gii->gi", C)
    score = diagonal[:, None] * W.astype(float) ** 2
    found = _sparse.prune(W, diagonal, sparsity=0.4)
    np.testing.assert_array_equal(found.mask, score > np.sort(score, axis=None)[23])


def test_pivots_are_what_error_feedback_leaves() -> None:
    """D of C = (I + U) D (I + U)^T equals each column's variance given the columns after it."""
    _, C = case(4, 1, 7)
    found = _sparse.pivots(C, 1, 7, damp=0.0)[0]
    order = np.argsort(-np.diag(C[0]), kind="stable")
    for at, i in enumerate(order):
        later = order[at + 1 :]
        left = C[0, i, i]
        if len(later):
            left -= C[0, i, later] @ np.linalg.solve(C[0][np.ix_(later, later)], C[0, later, i])
        assert found[i] == pytest.approx(left, rel=1e-4)


def first_weight(name: str):
    small, stats, _ = prepared(name)
    technique = get("sparse")
    site = max(technique.sites(small.model), key=lambda s: s.size_bytes)
    return small.model, site, technique, context(stats)


@pytest.mark.parametrize("model", graphs.NAMES)
def test_two_of_four_holds_in_the_file(model: str) -> None:
    original, site, technique, ctx = first_weight(model)
    weight = next(w for w in weights(original) if w.name == site.name)
    copy = surgery.copy_model(original)
    technique.apply(copy, site, Action.of("sparse", pattern="2:4", bits=32), ctx)
    value = next(v for n in copy.graph.all_nodes() for v in n.inputs if v is not None and v.name == site.name)
    read = encode.read(copy, value)
    assert read is not None
    assert read.kind == "bitmask"
    matrix = weight.to_matrix(encode.decode(read))
    k = matrix.shape[2] // 4 * 4
    assert ((matrix[..., :k].reshape(-1, 4) != 0).sum(axis=1) <= 2).all()


def one_matrix(stored: Array) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, len(stored)]))
    kept = ir.tensor(stored.astype(np.float32), name="w")
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=kept.shape, const_value=kept)
    node = ir.node("MatMul", [x, w], name="n")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([4, stored.shape[1]])
    return ir.Model(ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21}), ir_version=10)


@pytest.mark.parametrize(("kind", "wins"), [("normal", False), ("heavy", True)])
def test_only_options_that_win_are_offered_unless_thorough(kind: str, wins: bool) -> None:
    """Heavy-tailed weights gain from zeros, normally distributed ones do not: that is noted."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((256, 192)) if kind == "normal" else rng.standard_t(2.5, (256, 192))
    model, technique, ctx = one_matrix(drawn), get("sparse"), context(None)
    (site,) = technique.sites(model)
    every = list(technique.options(model, site, ctx))
    assert len(every) == 6 * 8
    assert not ctx.notes
    ctx.thorough = False
    offered = list(technique.options(model, site, ctx))
    assert bool(offered) == wins
    assert set(offered) < set(every)
    assert any("no gain" in note.text for note in ctx.notes) != wins
    dense = [get("weight_nbit").estimate(model, site, Action.of("weight_nbit", bits=b), ctx) for b in (5, 4, 3, 2)]
    for action in offered[::4]:
        copy = surgery.copy_model(model)
        (left,) = technique.apply(copy, site, action, ctx)
        estimate = technique.estimate(model, site, action, ctx)
        assert abs(left.size_bytes - estimate.size_bytes) < 0.03 * estimate.size_bytes
        # Less noise than the next n-bit weights that are not larger.
        assert all(estimate.noise < e.noise for e in dense if e.size_bytes <= left.size_bytes)


def test_a_zero_is_no_speed() -> None:
    model, site, technique, ctx = first_weight(graphs.NAMES[0])
    for action in technique.options(model, site, ctx):
        assert technique.estimate(model, site, action, ctx).work == 1.0


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"bits": 4}, "between 0 and 1"),
        ({"sparsity": 0.5, "bits": 7}, "bits must be one of"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "2:4", "sparsity": 0.5}, "without sparsity"),
    ],
)
def test_a_wrong_action_is_refused(params: dict[str, float | str], text: str) -> None:
    model, site, technique, ctx = first_weight(graphs.NAMES[0])
    with pytest.raises(TechniqueError, match=text):
        technique.apply(surgery.copy_model(model), site, Action.of("sparse", **params), ctx)

"""Ranks and sensitivity against numpy's SVD and brute-force least squares, on a small network made here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from featherweight import layer_view
from featherweight.cli import group
from featherweight.errors import DataError
from featherweight.report.json import document, plain
from featherweight.report.layer_view import error_words, prune_parts, rank_parts
from featherweight.report.terminal import to_text


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, const_value=ir.Tensor(array.astype(np.float32), name=name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Conv 4 -> 6 (3x3), depthwise 6 (3x3), mean, MatMul 6 -> 40 of rank 2."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4, 8, 8]))
    low = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 40))
    stored = [
        constant("stem.weight", rng.standard_normal((6, 4, 3, 3))),
        constant("depth.weight", rng.standard_normal((6, 1, 3, 3))),
        constant("head.weight", low),
    ]
    conv = ir.node("Conv", [x, stored[0]], name="stem")
    depth = ir.node("Conv", [conv.outputs[0], stored[1]], attributes={"group": 6}, name="depth")
    mean = ir.node("GlobalAveragePool", [depth.outputs[0]], name="mean")
    flat = ir.node("Flatten", [mean.outputs[0]], name="flat")
    head = ir.node("MatMul", [flat.outputs[0], stored[2]], name="head")
    nodes = [conv, depth, mean, flat, head]
    for i, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"v{i}"
    y = head.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["batch", 40])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=stored, opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((20, 4, 8, 8)).astype(np.float32))
    return tmp_path / "d.npz"


def test_ranks_are_those_of_the_weights(path: Path) -> None:
    view = layer_view.rank_view(path)
    lines = {line.name: line for line in view.lines}
    assert view.samples == 0
    assert list(lines) == ["head.weight", "stem.weight"]  # largest first; a depthwise kernel has no rank
    assert any(note.where == "depth.weight" and "no rank to lower" in note.text for note in view.notes)
    head = lines["head.weight"]
    assert (head.groups, head.out, head.columns, head.size_bytes, head.macs) == (1, 40, 6, 960, 240)
    assert head.break_even == 5  # 5 * 46 < 240 < 6 * 46
    assert [at.rank for at in head.at][1:] == [2, 2]
    assert head.pays_at == 0.999
    assert head.at[2].size_bytes == 960 * 2 * 46 // 240
    assert head.at[2].macs == 2 * 46
    assert lines["stem.weight"].macs == 6 * 36 * 36


@pytest.mark.parametrize("shape", [(1, 5, 9), (1, 9, 5), (3, 4, 4)])
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_the_spectrum_is_that_of_the_whitened_weight(shape: tuple[int, int, int], kind: str) -> None:
    rng = np.random.default_rng(2)
    W = rng.standard_normal(shape).astype(np.float32)
    g, _, k = shape
    x = rng.standard_normal((g, 30, k)) @ rng.standard_normal((k, k))
    C = x.transpose(0, 2, 1) @ x / 30
    given = {"full": C, "diagonal": np.einsum("gii->gi", C), "none": None}[kind]
    root = {"full": np.linalg.cholesky(C), "diagonal": None, "none": np.broadcast_to(np.eye(k), (g, k, k))}[kind]
    if root is None:
        root = np.stack([np.diag(np.sqrt(d)) for d in np.einsum("gii->gi", C)])
    found = layer_view.spectrum(W, given)
    np.testing.assert_allclose(found, np.linalg.svd(W @ root, compute_uv=False) ** 2, rtol=1e-6)


def test_the_rank_keeping_a_share_is_the_least() -> None:
    energies = np.array([[8.0, 1.0, 0.5], [0.0, 0.5, 0.0]])  # 8, 9.5, 10 of 10
    ranks = [layer_view.rank_keeping(energies, share) for share in (0.5, 0.8, 0.81, 0.95, 0.96, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert layer_view.rank_keeping(0 * energies, 0.9) == 0


def least(W: np.ndarray, C: np.ndarray, keep: list[int]) -> float:
    """Error of the best W' on `keep`, by the Schur complement of what is gone."""
    gone = [i for i in range(len(C)) if i not in keep]
    S = C[np.ix_(gone, gone)]
    if keep:
        S = S - C[np.ix_(gone, keep)] @ np.linalg.solve(C[np.ix_(keep, keep)], C[np.ix_(keep, gone)])
    return float(np.einsum("ok,kl,ol->", W[:, gone], S, W[:, gone]))


def test_the_first_channel_to_go_is_the_cheapest_of_all() -> None:
    rng = np.random.default_rng(3)
    W = rng.standard_normal((2, 5, 6)).astype(np.float32)
    x = rng.standard_normal((2, 50, 6)) @ rng.standard_normal((6, 6))
    C = x.transpose(0, 2, 1) @ x / 50
    found = layer_view.channel_errors(W, C, 2)
    alone = [
        least(W[g].astype(float), C[g], [i for i in range(6) if i // 2 != u])
        for g, u in itertools.product(range(2), range(3))
    ]
    assert found[0] == pytest.approx(min(alone), rel=1e-4)
    assert found[-1] == pytest.approx(sum(least(W[g].astype(float), C[g], []) for g in range(2)), rel=1e-4)
    assert (np.diff(found) >= 0).all()


def test_without_covariances_errors_are_sums_of_squares() -> None:
    W = np.array([[[1.0, 2.0, 3.0]]], np.float32)
    np.testing.assert_allclose(layer_view.channel_errors(W, np.array([[4.0, 1.0, 1.0]]), 1), [4, 8, 17])
    depthwise = np.array([[[2.0]], [[1.0]], [[3.0]]], np.float32)
    np.testing.assert_allclose(layer_view.channel_errors(depthwise, np.ones((3, 1, 1)), 1), [1, 5, 14])


def test_sensitivity_counts_channels_of_each_layer(path: Path, data: Path) -> None:
    view = layer_view.prune_view(path, data=data)
    lines = {line.name: line for line in view.lines}
    assert view.samples == 20
    assert {n: (line.channels, line.width) for n, line in lines.items()} == {
        "head.weight": (6, 1), "stem.weight": (4, 9), "depth.weight": (6, 9),
    }  # fmt: skip
    for line in view.lines:
        errors = [at.error for at in line.at]
        assert errors == sorted(errors)
        assert 0 <= errors[0] < errors[2] < 1
    assert [at.channels for at in lines["head.weight"].at] == [1, 2, 3]
    # White noise in: a channel of the first layer carries its share of the signal, and nothing makes up for it.
    stem = lines["stem.weight"].at
    assert 0.1 < stem[0].error < 0.3
    assert layer_view.rank_view(path, data=data).samples == 20


def test_sensitivity_without_data_says_what_to_give(path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        layer_view.prune_view(path, data=None)


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_and_json_is_plain(path: Path, data: Path, width: int) -> None:
    ranks, pruned = layer_view.rank_view(path), layer_view.prune_view(path, data=data)
    shown = to_text(rank_parts(ranks), width=width)
    assert "low rank could pay for 1 of 2 weights at 90% of the energy, 1 at 99%, 1 at 99.9%" in " ".join(shown.split())
    assert "at 99.9%: 38% left" in shown
    other = to_text(prune_parts(pruned), width=width)
    assert "-30%" in other
    assert "4 of 9" in other
    assert max(map(len, (shown + other).splitlines())) <= width
    assert '"kind": "ranks"' in document("ranks", plain(ranks))
    assert '"channels": 6' in document("prune_sensitivity", plain(pruned))


def test_errors_are_shown_with_as_many_digits_as_they_need() -> None:
    assert [error_words(e) for e in (0, 1e-6, 0.0042, 0.042, 0.42)] == ["0", "<0.01%", "0.42%", "4.2%", "42%"]


def test_the_command_shows_each_view(path: Path, data: Path) -> None:
    ranks = CliRunner().invoke(group, ["inspect", str(path), "--ranks", "--json"])
    found = json.loads(ranks.stdout)
    assert (found["kind"], found["lines"][0]["break_even"], found["lines"][0]["at"][2]["rank"]) == ("ranks", 5, 2)
    asked = ["inspect", str(path), "--prune-sensitivity"]
    pruned = CliRunner().invoke(group, [*asked, "--data", str(data), "--json"])
    found = json.loads(pruned.stdout)
    assert (found["kind"], found["samples"]) == ("prune_sensitivity", 20)
    assert "Output error without a share" in CliRunner().invoke(group, [*asked, "--data", str(data)]).stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["--prune-sensitivity"], "give --data"), (["--ranks", "--channels"], "give one of them")],
)
def test_a_view_that_cannot_be_shown_is_a_usage_error(path: Path, arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(group, ["inspect", str(path), *arguments])
    assert result.exit_code == 2
    assert text in result.output

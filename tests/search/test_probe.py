"""Gains: closed forms against sampled inputs, and a network whose gains are known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from featherweight.runtime import metrics, ort
from featherweight.search.probe import child_divergence, gains, output_noise, perturbed, relative_noise


def test_relative_noise_is_what_samples_show():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5)
    w = rng.normal(size=(1, 3, 5)).astype(np.float32)
    changed = (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32)
    y, z = x @ w[0].T, x @ changed[0].T
    shown = ((z - y) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    second = (x.T @ x / len(x))[None]
    assert relative_noise(w, changed, second, x.mean(axis=0)[None]) == pytest.approx(shown, rel=1e-5)


def test_perturbation_leaves_the_mean_output_alone():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(2, 4, 9)).astype(np.float32)
    mean = rng.normal(size=(2, 9))
    moved = perturbed(w, mean)
    assert not np.array_equal(moved, w)
    assert np.einsum("gok,gk->go", moved - w, mean) == pytest.approx(np.zeros((2, 4)), abs=1e-5)


def test_all_zero_channels_stay_zero():
    w = np.zeros((1, 2, 4), np.float32)
    w[0, 1] = 1.3
    assert np.array_equal(perturbed(w)[0, 0], np.zeros(4))


def test_output_noise_by_hand():
    y = np.array([[1.0, 3.0]])  # spread around 2: 1 + 1
    assert output_noise({"y": y}, {"y": y + np.array([[0.1, 0.3]])}) == pytest.approx(0.1 / 2)
    assert output_noise({"y": y}, {"y": y * np.nan}) == np.inf
    assert output_noise({"ids": np.array([1, 2])}, {"ids": np.array([3, 4])}) == 0.0


def test_minus_infinity_in_the_reference_is_no_noise():
    y = np.array([-np.inf, 1.0, 2.0])
    assert output_noise({"y": y}, {"y": y.copy()}) == 0.0


def test_sites_that_were_not_probed_get_the_median_gain():
    found = gains({"a": 0.2, "b": 0.4, "c": 0.6}, {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.0})
    assert found == pytest.approx({"a": 2.0, "b": 4.0, "c": 6.0, "d": 4.0, "e": 4.0})


def scaled(path: Path, factor: float) -> str:
    """A model file: logits are `factor` times the input."""
    body = f"{{ k = Constant<value_float = {factor}>() y = Mul(x, k) }}"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n, 3] x) => (float[n, 3] y) {body}'
    onnx.save(onnx.parser.parse_model(text), path)
    return str(path)


def test_what_a_reference_answered_is_kept_until_its_file_or_the_feeds_change(tmp_path: Path, monkeypatch):
    made: list[str] = []
    session = ort.session

    def noted(path, **options):
        made.append(Path(path).name)
        return session(path, **options)

    monkeypatch.setattr(ort, "session", noted)
    metric = metrics.get("kl")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(3)]
    reference, other = scaled(tmp_path / "a.onnx", 1.0), scaled(tmp_path / "b.onnx", 1.5)
    x = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
    p, q = (np.exp(k * x) / np.exp(k * x).sum(axis=1, keepdims=True) for k in (1.0, 1.5))
    expected = float((p * np.log(p / q)).sum(axis=1).mean())

    for _ in range(2):
        noise, apart = child_divergence(reference, other, feeds, 1, metric)
        assert apart == pytest.approx(expected, rel=1e-4)
        assert noise > 0
    assert made == ["a.onnx", "b.onnx", "b.onnx"]
    assert child_divergence(reference, other, feeds[:2], 1, metric)[1] != pytest.approx(expected)
    assert made[3:] == ["a.onnx", "b.onnx"]
    os.utime(scaled(Path(reference), 1.5), ns=(1, 1))
    assert child_divergence(reference, other, feeds[:2], 1, metric) == pytest.approx((0.0, 0.0), abs=1e-9)

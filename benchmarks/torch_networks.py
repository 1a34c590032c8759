"""The benchmark's networks as PyTorch modules, for peers that prune modules. torch only; run in the peer's environment.

Parameter names are those of the checkpoints, so each loads strictly.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# (repeats, first stride)
_MOBILENET_STAGES = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
# (repeats, kernel, first stride)
_LITE0_STAGES = ((1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1))
State = Mapping[str, Tensor]


def _conv(state: State, name: str, *, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    out, per_group, kernel, _ = state[f"{name}.weight"].shape
    groups = out if per_group == 1 and kernel > 1 else 1
    return nn.Conv2d(per_group * groups, out, kernel, stride, padding, groups=groups, bias=False)


def _norm(state: State, name: str, epsilon: float) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(len(state[f"{name}.weight"]), eps=epsilon)


class _Lite0Block(nn.Module):
    def __init__(self, state: State, at: str, kernel: int, stride: int, size: int) -> None:
        super().__init__()
        self.expands = f"{at}._expand_conv.weight" in state
        if self.expands:
            self._expand_conv = _conv(state, f"{at}._expand_conv")
            self._bn0 = _norm(state, f"{at}._bn0", 1e-3)
        self._depthwise_conv = _conv(state, f"{at}._depthwise_conv", stride=stride)
        self._bn1 = _norm(state, f"{at}._bn1", 1e-3)
        self._project_conv = _conv(state, f"{at}._project_conv")
        self._bn2 = _norm(state, f"{at}._bn2", 1e-3)
        self.pads = same_pads(size, kernel, stride)
        first = self._expand_conv if self.expands else self._depthwise_conv
        self.adds = stride == 1 and first.in_channels == self._project_conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(functional.pad(y, self.pads))))
        y = self._bn2(self._project_conv(y))
        return y + x if self.adds else y


class Lite0(nn.Module):
    """`image` (n, 3, 224, 224) to (n, 1000)."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(state, "_conv_stem", stride=2), _norm(state, "_bn0", 1e-3)
        self.pads, size = same_pads(224, 3, 2), 112
        self._blocks = nn.ModuleList()
        for repeats, kernel, first_stride in _LITE0_STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                self._blocks.append(_Lite0Block(state, f"_blocks.{len(self._blocks)}", kernel, stride, size))
                size //= stride
        self._conv_head, self._bn1 = _conv(state, "_conv_head"), _norm(state, "_bn1", 1e-3)
        self._fc = nn.Linear(*reversed(state["_fc.weight"].shape))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(functional.pad(x, self.pads))))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's "same" as (left, right, top, bottom)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2, total // 2, total - total // 2


class _MobileBlock(nn.Module):
    def __init__(self, state: State, at: str, stride: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        expands = f"{at}.conv.3.weight" in state
        names = [f"{at}.conv.{i}.0" for i in range(2 if expands else 1)]
        for name in names:
            wide = state[f"{name}.weight"].shape[-1] == 3
            conv = _conv(state, name, stride=stride if wide else 1, padding=1 if wide else 0)
            parts.append(nn.Sequential(conv, _norm(state, name.removesuffix("0") + "1", 1e-5), nn.ReLU6()))
        last = f"{at}.conv.{len(names)}"
        parts += [_conv(state, last), _norm(state, f"{at}.conv.{len(names) + 1}", 1e-5)]
        self.conv = nn.Sequential(*parts)
        first = parts[0][0]  # type: ignore[index]
        self.adds = stride == 1 and first.in_channels == state[f"{last}.weight"].shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """`image` (n, 3, 224, 224) to (n, 1000); torchvision's names."""

    def __init__(self, state: State) -> None:
        super().__init__()

        def stem(index: int, stride: int, padding: int) -> nn.Sequential:
            conv = _conv(state, f"features.{index}.0", stride=stride, padding=padding)
            return nn.Sequential(conv, _norm(state, f"features.{index}.1", 1e-5), nn.ReLU6())

        parts: list[nn.Module] = [stem(0, 2, 1)]
        for repeats, first_stride in _MOBILENET_STAGES:
            for repeat in range(repeats):
                parts.append(_MobileBlock(state, f"features.{len(parts)}", first_stride if repeat == 0 else 1))
        parts.append(stem(len(parts), 1, 0))
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(*reversed(state["classifier.1.weight"].shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict({k: nn.Linear(width, width) for k in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})
        self.heads, self.head_width = heads, width // heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t = x.shape[:2]
        q, k, v = (
            self.self[p](x).view(n, t, self.heads, self.head_width).transpose(1, 2) for p in ("query", "key", "value")
        )
        scores = q @ k.transpose(2, 3) / self.head_width**0.5 + bias
        joined = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, self.heads * self.head_width)
        return self.output["LayerNorm"](self.output["dense"](joined) + x)


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention(x, bias)
        y = self.output["dense"](functional.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](y + x)


class MiniLM(nn.Module):
    """Token ids, mask and types (n, t) int64 to mean-pooled (n, 384)."""

    def __init__(self, state: State) -> None:
        super().__init__()
        sizes = {k: state[f"embeddings.{k}_embeddings.weight"].shape for k in ("word", "position", "token_type")}
        width = sizes["word"][1]
        self.embeddings = nn.ModuleDict({f"{k}_embeddings": nn.Embedding(*v) for k, v in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, 1e-12)
        inner = state["encoder.layer.0.intermediate.dense.weight"].shape[0]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(width, inner, 12) for _ in range(6))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        e = self.embeddings
        places = torch.arange(input_ids.shape[1]).unsqueeze(0)
        x = e["word_embeddings"](input_ids) + e["token_type_embeddings"](token_type_ids)
        x = e["LayerNorm"](x + e["position_embeddings"](places))
        bias = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(torch.float32).min
        for layer in self.encoder["layer"]:  # type: ignore[union-attr]
            x = layer(x, bias)
        kept = attention_mask.unsqueeze(-1).to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


class VoiceEncoder(nn.Module):
    """`mels` (n, 160, 40) to unit vectors (n, 256). One nn.LSTM a layer: the pruner refuses stacked ones."""

    def __init__(self, _: State) -> None:
        super().__init__()
        self.lstm = nn.ModuleList(nn.LSTM(40 if i == 0 else 256, 256, batch_first=True) for i in range(3))
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        x = mels
        for layer in self.lstm:
            x, _ = layer(x)
        y = functional.relu(self.linear(x[:, -1]))
        return y / y.norm(dim=1, keepdim=True).clamp(min=1e-12)


NETWORKS = {"lite0": Lite0, "mobilenetv2": MobileNetV2, "minilm": MiniLM, "resemblyzer": VoiceEncoder}


def load(name: str, weights: Path) -> nn.Module:
    """The network with its weights, in evaluation mode. `ppocr` is converted from its ONNX file."""
    if name == "ppocr":
        return _converted(weights)
    state: dict[str, Any]
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    if name == "resemblyzer":
        known = {k: v for k, v in state["model_state"].items() if k.startswith(("lstm", "linear"))}
        state = {re.sub(r"^lstm\.(\w+)_l(\d)$", r"lstm.\2.\1_l0", k): v for k, v in known.items()}
    net = NETWORKS[name](state)
    extra = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    net.load_state_dict({k: v for k, v in state.items() if k not in extra})
    return net.eval()


def _converted(path: Path) -> nn.Module:
    """An ONNX file as modules. onnx2torch names torchvision for two detection operators alone: a stub stands in.

    It reads no `auto_pad`, so that is written out (all of PP-OCR's are 2 x 2 kernels at stride 1).
    """
    operators = types.ModuleType("torchvision.ops")
    operators.roi_align = None  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    sys.modules.setdefault("torchvision.ops", operators)
    import onnx
    from onnx2torch import convert

    model = onnx.load(path)
    for node in model.graph.node:
        same = [a for a in node.attribute if a.name == "auto_pad" and a.s == b"SAME_UPPER"]
        for attribute in same:
            node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute("pads", [0, 0, 1, 1]))
    _fold_biases(model)
    return convert(model).eval()


def _fold_biases(model: Any) -> None:
    """Conv, then Add of a constant (1, c, 1, 1): one Conv with a bias. The pruner does not see constants."""
    from onnx import numpy_helper

    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    for add in [n for n in model.graph.node if n.op_type == "Add"]:
        for value, constant in (add.input, reversed(add.input)):
            conv, bias = makers.get(value), constants.get(constant)
            readers = sum(value in n.input for n in model.graph.node)
            if conv is None or bias is None or conv.op_type != "Conv" or bias.ndim != 4 or readers != 1:
                continue
            model.graph.initializer.append(numpy_helper.from_array(bias.reshape(-1), f"{constant}::bias"))
            conv.input.append(f"{constant}::bias")
            conv.output[0] = add.output[0]
            model.graph.node.remove(add)
            break

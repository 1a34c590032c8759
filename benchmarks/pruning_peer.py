"""Torch-Pruning, one shot: `python -m benchmarks.pruning_peer TOOL NAME WEIGHTS FOLDER OUTPUT`.

It runs in the tool's own environment, where featherweight is not installed. TOOL: `torch-pruning-30` (percent of MACs
to remove), `torch-pruning-50`, with `-bn` after it to re-estimate batch statistics on FOLDER's calibration images, and
`-8` after that to keep multiples of eight channels, which the runtime's kernels like.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch_pruning as tp
from torch import nn

from benchmarks import feeds, torch_networks

INPUTS = {
    "lite0": ("image",),
    "mobilenetv2": ("image",),
    "minilm": ("input_ids", "attention_mask", "token_type_ids"),
    "resemblyzer": ("mels",),
    "ppocr": ("x",),
}
OUTPUTS = {"minilm": "sentence_embedding", "resemblyzer": "embedding", "ppocr": "fetch_name_0"}
_PROBES = 12
_BATCH = 50


def prune(name: str, weights: Path, example: tuple[torch.Tensor, ...], gone: float, multiple: int | None) -> nn.Module:
    """The least uniform channel ratio, found by bisection, at which at least `gone` of the MACs are removed."""
    limit = (1 - gone) * macs(torch_networks.load(name, weights), example)
    low, high, best = 0.0, 1.0, None
    for _ in range(_PROBES):
        ratio = (low + high) / 2
        net = pruned_at(torch_networks.load(name, weights), name, example, ratio, multiple)
        if macs(net, example) <= limit:
            high, best = ratio, net
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"no channel ratio removes {gone:.0%} of the MACs")
    return best


def pruned_at(
    net: nn.Module, name: str, example: tuple[torch.Tensor, ...], ratio: float, multiple: int | None
) -> nn.Module:
    """Group L2 magnitude, the same ratio in every layer (the tool's defaults); the interface is left as it is."""
    options: dict[str, Any] = {}
    if name == "minilm":
        layers = net.encoder["layer"]
        heads = [layer.attention.self[p] for layer in layers for p in ("query", "key", "value")]
        options = {
            "num_heads": dict.fromkeys(heads, 12),
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": ratio,
        }
        # The width of the residual stream is the width of the output.
        kept = [layer.attention.output["dense"] for layer in layers] + [layer.output["dense"] for layer in layers]
        options["ignored_layers"] = [*kept, net.embeddings]
    elif name == "ppocr":
        # The layers around attention: with them the tool's dependency graph is not built within ten minutes.
        options["ignored_layers"] = [m for m in net.modules() if isinstance(m, nn.Conv2d)][-3:]
    else:
        options["ignored_layers"] = [m for m in net.modules() if isinstance(m, nn.Linear)][-1:]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        net, example, importance=importance, pruning_ratio=ratio, round_to=multiple, **options
    )
    pruner.step()
    if name == "minilm":
        for layer in net.encoder["layer"]:
            layer.attention.heads = pruner.num_heads[layer.attention.self["query"]]
    return net


def macs(net: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of the layers with weights, and of the products in a converted network, in one call."""
    total = 0

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
        nonlocal total
        if isinstance(module, nn.LSTM):
            total += args[0].shape[0] * args[0].shape[1] * sum(w.numel() for w in module.parameters() if w.ndim == 2)
        else:
            total += out.numel() * (module.weight[0].numel() if hasattr(module, "weight") else args[0].shape[-1])

    counted = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTM)
    layers = [m for m in net.modules() if isinstance(m, counted) or type(m).__name__ == "OnnxMatMul"]
    hooks = [m.register_forward_hook(count) for m in layers]
    with torch.no_grad():
        net(*example)
    for hook in hooks:
        hook.remove()
    return total


@torch.no_grad()
def reestimate(net: nn.Module, name: str, folder: Path) -> None:
    """Running mean and variance of every batch norm: the average over batches of 50 calibration images."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise RuntimeError("the network has no batch norm to re-estimate")
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # type: ignore[assignment]  # a plain average
        m.train()
    items = feeds.read(folder, name)
    while batch := list(itertools.islice(items, _BATCH)):
        net(*(torch.from_numpy(np.concatenate([feed[k] for feed in batch])) for k in INPUTS[name]))
    net.eval()


def export(net: nn.Module, name: str, example: tuple[torch.Tensor, ...], out: Path) -> None:
    """Batch norms folded, the batch (and sequence) axis free."""
    names = list(INPUTS[name])
    free = {0: "batch", 1: "sequence"} if name == "minilm" else {0: "batch"}
    output = OUTPUTS.get(name, "logits")
    torch.onnx.export(
        net,
        example,
        str(out),
        input_names=names,
        output_names=[output],
        dynamic_axes=dict.fromkeys(names, free) | {output: {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load(out)
    fold_pads(model, {name: x.numpy() for name, x in zip(names, example, strict=True)})
    onnx.save(model, out)


def fold_pads(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> None:
    """A Pad in front of one Conv becomes that Conv's padding, as the runtime does not do by itself.

    How much is padded is exported as a computation; it is run once.
    """
    pads = [n for n in model.graph.node if n.op_type == "Pad"]
    if not pads:
        return
    names = [pad.input[1] for pad in pads]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    for pad, amounts in zip(pads, session.run(names, feed), strict=True):
        readers = [n for n in model.graph.node if pad.output[0] in n.input]
        if len(readers) != 1 or readers[0].op_type != "Conv":
            continue
        own = next(a for a in readers[0].attribute if a.name == "pads")
        own.ints[:] = [int(a + b) for a, b in zip(own.ints, amounts.reshape(2, 4)[:, 2:].ravel(), strict=True)]
        readers[0].input[0] = pad.input[0]
        model.graph.node.remove(pad)


def main(tool: str, name: str, weights: Path, folder: Path, out: Path) -> None:
    """Write OUTPUT, or fail with the tool's own error."""
    torch.manual_seed(0)
    feed = next(feeds.read(folder, name))
    example = tuple(torch.from_numpy(feed[k]) for k in INPUTS[name])
    gone, extras = int(tool.split("-")[2]) / 100, tool.split("-")[3:]
    net = prune(name, weights, example, gone, 8 if "8" in extras else None)
    if "bn" in extras:
        reestimate(net, name, folder)
    export(net, name, example, out)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))

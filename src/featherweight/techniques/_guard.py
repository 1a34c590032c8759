"""Float layers between integer ones must stay float: the runtime would round their weights by itself.

ONNX Runtime's graph optimiser (WeightBiasQuantization, since 1.20, at the basic level) turns DequantizeLinear -> Conv
-> QuantizeLinear with a constant float weight into an integer Conv, with one scale for the whole weight: depthwise
kernels and layers kept in float on purpose lose most of their precision (measured on EfficientNet-Lite0 with every
other layer in float: 10 dB at the outputs in place of 25). A Clip without bounds changes nothing, is not removed, and
breaks the pattern.
"""

from __future__ import annotations

import onnx_ir as ir

from featherweight.graph import surgery

ROUNDED_BY_THE_RUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What the optimiser fuses into such a layer first (MatMul + Add becomes a Gemm), or looks through.
FUSED = frozenset({"Add", "Mul", "Relu", "Clip", "LeakyRelu", "Reshape"})
STEPS = 3


def guard(model: ir.Model) -> int:
    """Put a Clip without bounds in front of float layers that stand between integer tensors; returns how many."""
    exposed = [node for node in surgery.walk(model.graph) if _exposed(node)]
    namer = surgery.Namer(model) if exposed else None
    for node in exposed:
        source = node.inputs[0]
        assert namer is not None
        assert source is not None
        clip = surgery.make_node(namer, "Clip", [source], "kept_float")
        clip.outputs[0].type, clip.outputs[0].shape = source.type, source.shape
        surgery.insert_before(node, [clip])
        surgery.replace_input(node, 0, clip.outputs[0])
    return len(exposed)


def _exposed(node: ir.Node) -> bool:
    """True for DequantizeLinear -> node with a float weight -> (what fuses into it) -> QuantizeLinear."""
    if node.op_type not in ROUNDED_BY_THE_RUNTIME or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return False
    if not _made_by(node.inputs[0], "DequantizeLinear") or _made_by(node.inputs[1], "DequantizeLinear"):
        return False
    reached = list(node.outputs)
    for _ in range(STEPS):
        readers = [use.node for value in reached for use in value.uses()]
        if any(reader.op_type == "QuantizeLinear" for reader in readers):
            return True
        reached = [reader.outputs[0] for reader in readers if reader.op_type in FUSED]
    return False


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type

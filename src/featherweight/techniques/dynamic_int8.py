"""8-bit weights, activations rounded at run time with one scale a tensor: for transformers; needs no ranges.

MatMul and Gemm become DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul [-> Add], standard operators that the
runtime fuses into one kernel. Convolutions are refused: ConvInteger is several times slower than float here. One
scale serves a whole batch, so where samples of one batch differ much in size the small ones are ruined; such
activations are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import encode, surgery
from featherweight.graph import weights as graph_weights
from featherweight.techniques import _noise, _qdq, _units
from featherweight.techniques._protocol import Context, Estimate, Technique
from featherweight.techniques.static_int8 import BITS, weight_codes

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight

F32 = npt.NDArray[np.float32]
#: Samples of one batch may differ this much in their greatest |x|: the smallest then keeps 5 of 8 bits.
MAX_ROW_SPAN = 8.0


class DynamicInt8:
    """See the module's text. Sites are weights read only by MatMul and Gemm nodes of the main graph."""

    name: ClassVar[str] = "dynamic_int8"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = True

    def sites(self, model: ir.Model) -> Iterator[Site]:
        """Weights of MatMul and Gemm."""
        for weight in graph_weights.weights(model):
            if _refusal(model, weight) is None:
                nodes = tuple(use.path for use in weight.uses)
                yield Site(weight.name, "weight", (weight.name,), nodes, weight.size_bytes)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """8 to 2 weight bits, unless the samples of a batch differ too much for one scale."""
        weight = ctx.weight(model, site.name)
        reason = _refusal(model, weight) or _uneven(weight, ctx)
        if reason is not None:
            ctx.note(site.name, f"not computed in dynamic int8: {reason}")
            return []
        return [Action.of(self.name, weight_bits=bits) for bits in BITS]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Closed form; the output is not rounded."""
        return _noise.estimate(ctx.weight(model, site.name), int(action.get("weight_bits", 8)), ctx)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Rewrite every node that reads the weight."""
        weight = _units.find(model, site.name)
        reason = _refusal(model, weight)
        if reason is not None:
            raise TechniqueError(f"dynamic_int8 needs a MatMul or Gemm at {site.name!r}, but {reason}")
        bits = int(action.get("weight_bits", 8))
        if bits not in BITS:
            raise TechniqueError(f"weight_bits must be one of {BITS}, but got {bits}")
        codes, scale = weight_codes(weight, bits, ctx)
        stored_codes = weight.from_matrix(codes)
        transposed = weight.main_use.role == "gemm" and weight.channel_axis == 0
        if transposed:
            stored_codes = np.ascontiguousarray(stored_codes.T)
            weight.value.shape = ir.Shape(stored_codes.shape)
        stored = encode.attach(model, weight.value, encode.int_tensor(stored_codes, bits))
        writer = _qdq.Writer(model)
        for use in weight.uses:
            _rewrite(writer, use.node, stored, scale.reshape(-1).astype(np.float32))
        surgery.remove_unused(model)
        size = int(codes.size * bits // 8)
        return (Site(site.name, "weight", (stored.name or "",), site.nodes, size),)

    def finish(self, model: ir.Model, ctx: Context) -> None:  # noqa: ARG002
        """Nodes that round the same activation share one DynamicQuantizeLinear."""
        first: dict[ir.Value, ir.Node] = {}
        for node in list(model.graph):
            if node.op_type != "DynamicQuantizeLinear" or node.inputs[0] is None:
                continue
            kept = first.setdefault(node.inputs[0], node)
            if kept is not node:
                for old, new in zip(node.outputs, kept.outputs, strict=True):
                    surgery.replace_uses(old, new)
                model.graph.remove(node, safe=True)


def _refusal(model: ir.Model, weight: Weight) -> str | None:
    if any(use.role == "conv" for use in weight.uses):
        return "ConvInteger is slower than float on this runtime; static_int8 has the fast kernel"
    return _units.refusal(model, weight)


def _uneven(weight: Weight, ctx: Context) -> str | None:
    for use in weight.uses:
        x = use.input_value
        found = ctx.stats.values.get(x.name or "") if ctx.stats is not None and x is not None else None
        if found is None:
            continue
        if not found.finite:
            return f"the input of {use.path!r} holds infinities or NaN"
        if found.row_span > MAX_ROW_SPAN:
            return (
                f"samples of one batch differ {found.row_span:.0f}-fold at the input of {use.path!r} and would share "
                f"one scale (at most {MAX_ROW_SPAN:.0f}-fold)"
            )
    return None


def _rewrite(writer: _qdq.Writer, node: ir.Node, stored: ir.Value, scale: F32) -> None:
    """Replace a MatMul or Gemm by its dynamic integer form; the result keeps the name."""
    out = node.outputs[0]
    name = out.name or "matmul"
    namer = writer.namer
    x = node.inputs[0]
    new: list[ir.Node] = []
    if node.op_type == "Gemm" and int(_units.attribute(node, "transA", 0)):
        new.append(surgery.make_node(namer, "Transpose", [x], f"{name}_rows", attributes={"perm": [1, 0]}))
        x = new[-1].outputs[0]
    alpha = np.float32(_units.attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else np.float32(1)
    rank_one = len(stored.shape or ()) == 1
    weight_scale = (scale * alpha).reshape(() if rank_one else (-1,)).astype(np.float32)
    # A per-channel zero point is refused for codes of more than two axes; absent means 0.
    zero = [] if len(stored.shape or ()) > 2 else [writer.constant(np.zeros(weight_scale.shape, np.int8), "zeros")]
    q = surgery.make_node(namer, "DynamicQuantizeLinear", [x], f"{name}_codes", n_outputs=3)
    dot = surgery.make_node(namer, "MatMulInteger", [q.outputs[0], stored, q.outputs[2], *zero], f"{name}_int32")
    wide = surgery.make_node(namer, "Cast", [dot.outputs[0]], f"{name}_wide", attributes={"to": int(ir.DataType.FLOAT)})
    scales = writer.constant(weight_scale, "scales")
    both = surgery.make_node(namer, "Mul", [q.outputs[1], scales], f"{name}_scale")
    result = surgery.make_node(namer, "Mul", [wide.outputs[0], both.outputs[0]], f"{name}_scaled")
    new += [q, dot, wide, both, result]
    bias = _gemm_bias(node, scale.size)
    if bias is not None:
        add = surgery.make_node(namer, "Add", [result.outputs[0], writer.constant(bias, "bias")], f"{name}_biased")
        new.append(add)
    elif node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        beta = writer.constant(np.asarray(_units.attribute(node, "beta", 1.0), np.float32), "beta")
        scaled = surgery.make_node(namer, "Mul", [node.inputs[2], beta], f"{name}_beta")
        new += [scaled, surgery.make_node(namer, "Add", [result.outputs[0], scaled.outputs[0]], f"{name}_biased")]
    surgery.insert_before(node, new)
    final = new[-1].outputs[0]
    final.shape, final.type = out.shape, out.type
    surgery.replace_uses(out, final)
    surgery.remove_node(node)


def _gemm_bias(node: ir.Node, channels: int) -> F32 | None:
    """The constant bias of a Gemm times beta in its own shape, or None."""
    if node.op_type != "Gemm" or len(node.inputs) < 3:
        return None
    found = _units.constant(node.inputs[2])
    if found is None:
        return None
    scaled = found.astype(np.float32) * np.float32(_units.attribute(node, "beta", 1.0))
    return np.full(channels, scaled.reshape(()), np.float32) if scaled.size == 1 else scaled


TECHNIQUE: Technique = DynamicInt8()

"""Equal-function rescaling of channels before rounding (Nagel 2019, arXiv:1906.04721; Xiao 2022, arXiv:2211.10438).

A tensor x between layers has one 8-bit scale, so a channel much larger than the others ruins them. Multiplying
channel c of x by t_c > 0 in the layer that makes it, and dividing the readers' weights by t_c, changes nothing in
float: Relu, LeakyRelu, PRelu, pooling and sums over space are positively homogeneous. A Clip with an upper bound is
not: there only channels that stay below the bound are enlarged, and never past it. Where the maker has no weight (a
LayerNormalization with other readers, a product) the division is one Mul in front of the readers, done only where
the gain is large. t is chosen by estimated noise and only used where it lowers it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph import weights as graph_weights
from featherweight.graph.weights import Weight
from featherweight.stats import MomentStats, Statistics, folding
from featherweight.techniques import _units

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Clip")
ALPHAS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.5  # rescale only if the estimated noise falls below this share: estimates are within a factor of two
WORTH_A_MUL = 0.4  # an extra Mul must gain more
MARGIN = 2.0  # a clipped channel stays this far below the bound: calibration does not see every input
LARGEST_FACTOR = 1e4


@dataclass(frozen=True)
class Chain:
    """A rescalable tensor.

    `maker`: the weight that makes it (None: a Mul is put in front of the readers). `values`: it and what lies
    between. `ceiling`: the upper bound of a Clip on the way. `readers`: weights that multiply its channels.
    Tensors tied by residual sums were tried as groups too: no gain on MobileNetV2, so they are left alone.
    """

    value: ir.Value
    maker: Weight | None
    values: tuple[ir.Value, ...]
    ceiling: float
    readers: tuple[Weight, ...]


def equalise(model: ir.Model, stats: Statistics) -> tuple[ir.Model, Statistics]:
    """A model of equal function with channels rescaled where that lowers the estimated noise, and its statistics.

    The model given is not changed; without anything to gain it is returned as it is.
    """
    copy = surgery.copy_model(model)
    by_node = _single_weights(copy)
    changed = False
    for value in _candidates(copy):
        chain = _chain(value, by_node)
        factor = None if chain is None else best_factor(chain, stats)
        if chain is not None and factor is not None:
            stats = _rescale(copy, chain, factor, stats)
            changed = True
    return (copy, stats) if changed else (model, stats)


def _single_weights(model: ir.Model) -> dict[ir.Node, Weight]:
    """Weights with an integer kernel and one use, by the node that reads them."""
    return {
        weight.main_use.node: weight
        for weight in graph_weights.weights(model)
        if len(weight.uses) == 1 and not weight.main_use.layout and _units.refusal(model, weight) is None
    }


def _candidates(model: ir.Model) -> list[ir.Value]:
    """Inputs of weights, once each, in order."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            x = _units.activation(node, 0)
            if x is not None and x.producer() is not None:
                found[x] = None
    return list(found)


def _chain(value: ir.Value, by_node: dict[ir.Node, Weight]) -> Chain | None:
    if value.is_graph_output():
        return None
    uses = list(value.uses())
    readers = tuple(by_node[u.node] for u in uses if u.node in by_node and u.idx == 0)
    if not readers or any(r.main_use.node.op_type == "Gemm" and _transposed(r) for r in readers):
        return None
    nothing: tuple[Weight | None, tuple[ir.Value, ...], float] = (None, (value,), np.inf)
    maker, values, ceiling = _maker(value, by_node) if len(readers) == len(uses) else nothing
    if maker is None and any(r.main_use.role == "conv" for r in readers):
        return None  # an extra Mul in front of a convolution costs too much
    return Chain(value, maker, values, ceiling, readers)


def _transposed(weight: Weight) -> bool:
    return bool(_units.attribute(weight.main_use.node, "transA", 0))


def _maker(value: ir.Value, by_node: dict[ir.Node, Weight]) -> tuple[Weight | None, tuple[ir.Value, ...], float]:
    """Walk up homogeneous nodes with one reader each to the weight whose output channels these are."""
    values, ceiling = [value], np.inf
    while True:
        node = values[-1].producer()
        if node is None:
            return None, (value,), np.inf
        if node in by_node:
            weight = by_node[node]
            g, out, _ = weight.matrix_shape
            has_bias = node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None
            if has_bias and _units.bias_vector(node, g * out) is None:
                return None, (value,), np.inf
            return weight, tuple(values), ceiling
        if node.op_type == "Add":
            above = next((v for v in node.inputs if v is not None and v.const_value is None), None)
            maker = above.producer() if above is not None else None
            if maker is None or maker not in by_node or maker.op_type != "MatMul":
                return None, (value,), np.inf
            g, out, _ = by_node[maker].matrix_shape
            if _units.bias_add(maker, g * out) is not node:
                return None, (value,), np.inf
            return by_node[maker], (*values, maker.outputs[0]), ceiling
        if node.op_type not in HOMOGENEOUS:
            return None, (value,), np.inf
        if node.op_type in ("Relu", "Clip"):
            bounds = folding.folds(node)
            if bounds is None or bounds[0] not in (0.0, -np.inf):
                return None, (value,), np.inf
            ceiling = min(ceiling, bounds[1])
        above = node.inputs[0]
        if above is None or len(list(above.uses())) != 1 or above.is_graph_output() or len(node.outputs) > 1:
            return None, (value,), np.inf
        values.append(above)


def best_factor(chain: Chain, stats: Statistics) -> F32 | None:
    """Factors t (channels,) that lower the estimated noise enough, or None.

    With reach r_c of a channel, column size w_c = max |W| and energy e_c = sum W^2 of the readers, t_c is
    (w_c / r_c)^alpha up to a constant; noise is step^2 / 12 (sum e_c / t_c^2) of the activation plus the readers'
    weight rounding, whose step follows their largest rescaled weight.
    """
    found = stats.values.get(chain.value.name or "")
    if found is None or not found.finite or found.axis not in (1, -1):
        return None
    columns = [_columns(w) for w in chain.readers]
    channels = len(found.channel_high)
    if any(c is None or c.shape[1] != channels for c in columns):
        return None
    sizes = [np.abs(c).astype(np.float64) for c in columns if c is not None]
    reach = np.maximum(np.abs(found.channel_low), np.abs(found.channel_high)).astype(np.float64)
    power = np.square(found.rows, dtype=np.float64).mean(axis=0) if len(found.rows) else np.square(reach) / 4
    width = np.max([s.max(axis=0) for s in sizes], axis=0)
    live = (reach > 1e-6 * reach.max()) & (width > 1e-6 * width.max()) if reach.max() > 0 else np.zeros(channels, bool)
    if live.sum() < 2:
        return None
    base = _noise(np.ones(channels), reach, power, sizes)
    best, best_noise = None, base * (WORTH if chain.maker is not None else WORTH_A_MUL)
    for alpha in ALPHAS:
        t = np.ones(channels)
        t[live] = (
            (width[live] ** (1 - alpha) / reach[live] ** alpha)
            if chain.maker is None
            else ((width[live] / width[live].max()) ** (1 - alpha) * (reach[live].max() / reach[live]) ** alpha)
        )
        t = _allowed(t, live, reach, chain.ceiling)
        noise = _noise(t, reach, power, sizes)
        if noise < best_noise:
            best, best_noise = t.astype(np.float32), noise
    return best


def _allowed(t: F64, live: npt.NDArray[np.bool_], reach: F64, ceiling: float) -> F64:
    """Keep the largest reach as it is; under a ceiling only enlarge, and not past it; limit extreme factors."""
    t = np.where(live, t, 1.0)
    top = (reach * t)[live].max()
    t = np.where(live, t * reach[live].max() / top, 1.0)
    t = np.clip(t, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    if np.isfinite(ceiling):
        room = ceiling / np.maximum(reach * MARGIN, 1e-30)
        t = np.where(live & (room > 1), np.clip(t, 1.0, np.maximum(room, 1.0)), 1.0)
    # Powers of two are exact in float: the rescaled model gives the same bits wherever sums allow.
    return np.asarray(np.exp2(np.floor(np.log2(t) + 1e-9)), np.float64)


def _noise(t: F64, reach: F64, power: F64, sizes: list[F64]) -> float:
    step = (reach * t).max() / 255
    total = 0.0
    for size in sizes:
        scaled = size / t
        total += step**2 * float(np.square(scaled).sum())
        rows = scaled.max(axis=1) / 127
        # Error feedback leaves about a third of the weights' rounding noise.
        total += float(np.square(rows).sum()) * float((power * np.square(t)).sum()) / 3
    return total / 12


def _columns(weight: Weight) -> F32 | None:
    """|W| of a reader by (output row, input channel): the largest over the kernel; depthwise has one row."""
    matrix = weight.to_matrix(weight.array())
    g, out, k = matrix.shape
    positions = int(np.prod(weight.shape[2:], dtype=np.int64)) if weight.main_use.role == "conv" else 1
    by_channel = np.abs(matrix).reshape(g, out, k // positions, positions).max(axis=3)
    return np.asarray(by_channel.transpose(1, 0, 2).reshape(out, -1), np.float32)


def _rescale(model: ir.Model, chain: Chain, t: F32, stats: Statistics) -> Statistics:
    """Apply t to the maker (or as a Mul) and 1 / t to the readers, in place; statistics follow."""
    values = dict(stats.values)
    if chain.maker is not None:
        _scale_rows(chain.maker, t)
        names = [v.name or "" for v in chain.values]
    else:
        names = [_insert_mul(model, chain, t)]
        values[names[0]] = stats.values[chain.value.name or ""]
    for name in names:
        if name in values and len(values[name].channel_high) == len(t):
            values[name] = values[name].scaled(t)
    moments = dict(stats.moments)
    for weight in chain.readers:
        factor = _scale_columns(weight, t)
        found = moments.get(weight.name)
        if found is not None:
            moments[weight.name] = _scaled_moments(found, factor)
    return dataclasses.replace(stats, values=values, moments=moments)


def _scaled_moments(found: MomentStats, factor: F64) -> MomentStats:
    second = found.second
    if second.ndim == 3:
        second = second * factor[:, :, None] * factor[:, None, :]
    else:
        second = second * np.square(factor)
    return dataclasses.replace(found, second=second, mean=found.mean * factor)


def _scale_rows(weight: Weight, t: F32) -> None:
    """Multiply the output channels of a weight, and its bias, by t (channels,)."""
    matrix = weight.to_matrix(weight.array())
    g, out, _ = matrix.shape
    surgery.set_initializer(weight.value, weight.from_matrix(matrix * t.reshape(g, out, 1)))
    node = weight.main_use.node
    holder, index = node, 2
    if node.op_type == "MatMul":
        add = _units.bias_add(node, g * out)
        if add is None:
            return
        holder, index = add, next(i for i, v in enumerate(add.inputs) if _units.constant(v) is not None)
    value = holder.inputs[index] if index < len(holder.inputs) else None
    bias = _units.constant(value)
    if value is None or bias is None:
        return
    # A private copy: the vector may be shared with another node.
    fresh = (np.broadcast_to(bias, (*bias.shape[:-1], g * out)) * t).astype(np.float32)
    graph = surgery.graph_of(value)
    name, i = f"{value.name}_scaled", 1
    while name in graph.initializers:
        name, i = f"{value.name}_scaled_{i}", i + 1
    holder.replace_input_with(index, surgery.add_initializer(graph, name, fresh))


def _scale_columns(weight: Weight, t: F32) -> F64:
    """Divide the input channels of a weight by t; returns t spread over the matrix's columns, (g, k)."""
    matrix = weight.to_matrix(weight.array())
    g, _, k = matrix.shape
    positions = int(np.prod(weight.shape[2:], dtype=np.int64)) if weight.main_use.role == "conv" else 1
    spread = np.repeat(t.reshape(g, k // positions), positions, axis=1)
    surgery.set_initializer(weight.value, weight.from_matrix((matrix / spread[:, None, :]).astype(np.float32)))
    return spread.astype(np.float64)


def _insert_mul(model: ir.Model, chain: Chain, t: F32) -> str:
    """Put x * t in front of the readers; returns the name of the product."""
    namer = surgery.Namer(model)
    name = chain.value.name or "value"
    factor = surgery.add_initializer(model.graph, namer(f"{name}_factors"), t)
    mul = surgery.make_node(namer, "Mul", [chain.value, factor], f"{name}_rescaled")
    surgery.insert_after(chain.value, [mul])
    mul.outputs[0].shape, mul.outputs[0].type = chain.value.shape, chain.value.type
    for weight in chain.readers:
        weight.main_use.node.replace_input_with(0, mul.outputs[0])
    return mul.outputs[0].name or ""

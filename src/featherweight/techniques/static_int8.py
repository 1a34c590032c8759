"""8-bit weights and activations in the runtime's integer kernels, as standard Q/DQ (Nagel 2021, arXiv:2106.08295).

Weights s8 per output channel, rounded so that tr(dW C dW^T) is least; activations u8 with one scale a tensor, chosen
by output error. Where the target's kernels saturate pairs of products at 16 bits, every pair of weights that meets in
one accumulator fits 127 together, so the result is the same on every CPU. Biases are int32 and take the mean error.
Fewer weight bits (7 to 2) only change how the codes are stored: the same kernels run.
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
from featherweight.techniques import _guard, _islands, _kernels, _noise, _qdq, _ranges, _scales, _units
from featherweight.techniques._gptq import power_of_two, quantize, quantize_matrix
from featherweight.techniques._protocol import Context, Estimate, Technique

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight

F32 = npt.NDArray[np.float32]
BITS = (8, 7, 6, 5, 4, 3, 2)
#: A bias of the estimated input scale must leave this much of int32, as the final scale may be finer.
BIAS_HEADROOM = 8
#: Sums of squares of weights are held below this, so that adding some up stays in float32.
LARGEST_ENERGY = 1e30


class StaticInt8:
    """See the module's text. Sites are weights whose every use has an integer kernel."""

    name: ClassVar[str] = "static_int8"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = True

    def sites(self, model: ir.Model) -> Iterator[Site]:
        """Weights of Conv, Gemm and MatMul nodes of the main graph."""
        for weight in graph_weights.weights(model):
            if _units.refusal(model, weight) is None:
                nodes = tuple(use.path for use in weight.uses)
                yield Site(weight.name, "weight", (weight.name,), nodes, weight.size_bytes)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """8 to 2 weight bits, if the node's activations were observed and finite."""
        weight = ctx.weight(model, site.name)
        reason = _units.refusal(model, weight) or _unobserved(weight, ctx)
        if reason is not None:
            ctx.note(site.name, f"not computed in int8: {reason}")
            return []
        return [Action.of(self.name, weight_bits=bits) for bits in BITS]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Closed form; needs no run."""
        weight = ctx.weight(model, site.name)
        return _noise.estimate(weight, int(action.get("weight_bits", 8)), ctx)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Give the weight its codes; `finish` makes the node compute with them."""
        weight = _units.find(model, site.name)
        reason = _units.refusal(model, weight)
        if reason is not None:
            raise TechniqueError(f"static_int8 needs an integer kernel for {site.name!r}, but {reason}")
        bits = int(action.get("weight_bits", 8))
        if bits not in BITS:
            raise TechniqueError(f"weight_bits must be one of {BITS}, but got {bits}")
        codes, scale = weight_codes(weight, bits, ctx, corrected=_takes_bias(weight))
        _remember(weight, codes, scale, ctx)
        stored = encode.attach(model, weight.value, encode.int_tensor(weight.from_matrix(codes), bits))
        return (_dequantize(model, weight, stored, scale, site),)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Round activations, fold clips, store int32 biases; nodes that cannot compute in int8 keep float compute."""
        if ctx.stats is None:
            for node in list(_units.marked(model)):
                node.metadata_props.pop(_units.MARK)
                ctx.note(node.name or "", "weights are 8-bit, computed in float: no calibration statistics were given")
            return
        ready = []
        for unit in _units.units(model):
            reason = _not_ready(unit, ctx)
            if reason is None:
                ready.append(unit)
            else:
                unit.node.metadata_props.pop(_units.MARK)
                ctx.note(unit.node.name or "", f"weights are 8-bit, computed in float: {reason}")
        islands = _islands.plan(model, ctx.stats, ready, ctx.keep_float)
        grids = choose_grids(islands, ctx)
        kept = {unit.node: ctx.cache.get(("static_int8", "unit", unit.node.name)) for unit in ready}
        # Only the weights' mean error is corrected. What clipping takes from the mean was tried too, from the
        # sampled rows: it made MobileNetV2 1.3 dB worse, as rows are few beside rare large values.
        shifts = {node: found[0] for node, found in kept.items() if found is not None and found[0] is not None}
        for note in _qdq.write(model, islands, grids, shifts):
            ctx.note(note.where, note.text)
        surgery.remove_unused(model)
        _guard.guard(model)


def weight_codes(
    weight: Weight, bits: int, ctx: Context, *, corrected: bool = False
) -> tuple[npt.NDArray[np.int8], F32]:
    """Codes int8 (g, out, k) and scale float32 (g, out) of one weight; kept in `ctx.cache`.

    `corrected`: a bias takes the mean error away, so only the covariance of the inputs counts.
    """
    key = ("static_int8", ctx.stats.key if ctx.stats else "", weight.name, bits, corrected)
    if key in ctx.cache:
        found: tuple[npt.NDArray[np.int8], F32] = ctx.cache[key]
        return found
    matrix = weight.to_matrix(weight.array())
    second = ctx.stats.second_moment(weight.name) if ctx.stats is not None else None
    if second is not None and second.shape[0] != matrix.shape[0]:
        second = None
    mean = ctx.stats.mean(weight.name) if ctx.stats is not None else None
    if corrected and second is not None and mean is not None and second.ndim == 3:
        second = second - mean[:, :, None] * mean[:, None, :]
    codes, scale = rounded_codes(matrix, second, bits=bits, pairs=None if ctx.profile.int8_dot else pair_order(weight))
    floor = bias_scale_floor(weight, ctx)
    if floor is not None and (scale < floor).any():
        # Only these channels: their weights are so small that the bias in steps of sx * sw would pass int32.
        wide = np.maximum(scale, floor).astype(np.float32)
        top = 2 ** (bits - 1) - 1
        fresh = np.clip(np.rint(matrix / wide[..., None]), -top, top).astype(np.int8)
        codes = np.where((scale < floor)[..., None], fresh, codes)
        scale = wide
    ctx.cache[key] = codes, scale
    return codes, scale


def rounded_codes(
    matrix: F32, second: npt.NDArray[np.float64] | None, *, bits: int, pairs: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int8], F32]:
    """Matrix (g, out, k), second (g, k, k) or None -> codes int8, scale (g, out). `pairs`: the kernel's order, or None.

    At 8 bits the step is the covering one and one pass of error feedback does: further search gains 0.3 dB of
    about 50 and takes 5 times as long.
    """
    if bits < 8:
        # 7-bit codes reach 64 at most: two of them cannot saturate 16 bits with u8 activations.
        return quantize_matrix(matrix, second, bits=bits)
    top = np.abs(matrix).max(axis=2, initial=0)
    if pairs is not None and len(pairs) > 1:
        ordered = np.abs(matrix[..., pairs[: len(pairs) // 2 * 2]])
        top = np.maximum(top, (ordered[..., 0::2] + ordered[..., 1::2]).max(axis=2))
    scale = _scales.safe_scale((top / np.float32(127)).astype(np.float32))
    q = quantize(matrix, second, bits=8, scale=scale, sweeps=0, pair_safe=pairs is not None, reduction_order=pairs)
    return q.codes, q.scale


def pair_order(weight: Weight) -> npt.NDArray[np.int64]:
    """Columns of the weight's matrix in the order in which the kernel multiplies them."""
    use = weight.main_use
    if use.role == "conv":
        return _kernels.reduction_order(weight.shape[1], tuple(weight.shape[2:]))
    return np.arange(weight.matrix_shape[2])


def bias_scale_floor(weight: Weight, ctx: Context) -> F32 | None:
    """Least weight scale (g, out) at which the largest bias of the weight's uses still fits int32, or None."""
    g, out, _ = weight.matrix_shape
    floor = np.zeros(g * out, np.float32)
    for use in weight.uses:
        vector = _units.bias_vector(use.node, g * out)
        x = use.input_value
        stats = ctx.stats.values.get(x.name or "") if ctx.stats is not None and x is not None else None
        if vector is None or stats is None or not stats.finite:
            continue
        step = _ranges.grid_of(stats.low, stats.high).scale
        floor = np.maximum(floor, np.abs(vector) * BIAS_HEADROOM / (step * _kernels.BIAS_LIMIT)).astype(np.float32)
    return floor.reshape(g, out) if floor.any() else None


def _takes_bias(weight: Weight) -> bool:
    """True if `finish` can add to the bias behind the weight's only use."""
    if len(weight.uses) != 1:
        return False
    node = weight.main_use.node
    if node.op_type == "Gemm":
        bias = _units.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return len(node.inputs) < 3 or node.inputs[2] is None or (bias is not None and bias.ndim == 1)
    g, out, _ = weight.matrix_shape
    return node.op_type == "Conv" or _units.bias_add(node, g * out) is not None


def _remember(weight: Weight, codes: npt.NDArray[np.int8], scale: F32, ctx: Context) -> None:
    """Keep what bias correction needs: the mean error of the outputs, and what an error in each input channel costs."""
    alpha = np.float32(_units.attribute(weight.main_use.node, "alpha", 1.0))
    rounded = codes.astype(np.float32) * (scale * alpha)[..., None]
    matrix = weight.to_matrix(weight.array()) * alpha
    mean = ctx.stats.mean(weight.name) if ctx.stats is not None else None
    shift = None
    if len(weight.uses) == 1 and mean is not None and mean.shape == (matrix.shape[0], matrix.shape[2]):
        shift = np.einsum("gok,gk->go", (matrix - rounded).astype(np.float64), mean).ravel().astype(np.float32)
    positions = int(np.prod(weight.shape[2:], dtype=np.int64)) if weight.main_use.role == "conv" else 1
    g, out, k = rounded.shape
    unit = power_of_two(matrix)
    squares = np.square(matrix / unit).reshape(g, out, k // positions, positions).sum(axis=(1, 3))
    energy = np.minimum(squares.astype(np.float64) * float(unit) ** 2, LARGEST_ENERGY).astype(np.float32)
    for use in weight.uses:
        ctx.cache["static_int8", "unit", use.node.name] = (shift, energy.ravel())


def _dequantize(model: ir.Model, weight: Weight, stored: ir.Value, scale: F32, site: Site) -> Site:
    """Put DequantizeLinear behind the stored codes and mark the nodes that read it."""
    writer = _qdq.Writer(model)
    axis = weight.channel_axis
    flat = scale.reshape(-1) if axis is not None else scale.reshape(())
    alpha = float(_units.attribute(weight.main_use.node, "alpha", 1.0)) if weight.main_use.role == "gemm" else 1.0
    dq = writer.dequantized(stored, (flat * np.float32(alpha)).astype(np.float32), axis, np.int8, f"{weight.name}_dq")
    surgery.insert_after(stored, [dq])
    dq.outputs[0].shape, dq.outputs[0].type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    for use in weight.uses:
        use.node.replace_input_with(use.index, dq.outputs[0])
        use.node.attributes.pop("alpha", None)
        use.node.metadata_props[_units.MARK] = weight.name
    return Site(site.name, "weight", (dq.outputs[0].name or "",), site.nodes, int(stored_bytes(stored)))


def stored_bytes(stored: ir.Value) -> int:
    """Bytes of the codes' initializer."""
    return stored.const_value.nbytes if stored.const_value is not None else 0


def choose_grids(islands: _islands.Islands, ctx: Context) -> dict[ir.Value, _ranges.Grid]:
    """The grid of every value in the plan."""
    stats = ctx.stats
    if stats is None:
        raise TechniqueError("activation ranges need calibration statistics, but there are none; run stats.collect")
    importance = _importance(islands, ctx)
    grids: dict[ir.Value, _ranges.Grid] = {}
    for value in [*islands.inputs, *islands.codes_out]:
        if value in islands.tied:
            grids[value] = grids[islands.tied[value]]
            continue
        found = stats.values.get(value.name or "")
        bounds = islands.codes_out.get(value, (-np.inf, np.inf))
        maker = islands.before_fold.get(value, value).producer()
        if maker is not None and maker.op_type in _ranges.FIXED:
            grids[value] = _ranges.grid_of(*_ranges.FIXED[maker.op_type])
        elif found is None:
            raise TechniqueError(f"the range of {value.name!r} must be known to round it, but it was not observed")
        else:
            grids[value] = _ranges.best_grid(found, importance=importance.get(value), bounds=bounds)
    return grids


def _importance(islands: _islands.Islands, ctx: Context) -> dict[ir.Value, F32]:
    """What a squared error in each channel of a value costs at the outputs of the units that read it."""
    total: dict[ir.Value, F32] = {}
    for unit in islands.units:
        kept = ctx.cache.get(("static_int8", "unit", unit.node.name))
        if kept is None:
            continue
        before = total.get(unit.x)
        if before is None or before.shape == kept[1].shape:
            total[unit.x] = kept[1] if before is None else before + kept[1]
    return total


def _unobserved(weight: Weight, ctx: Context) -> str | None:
    for use in weight.uses:
        x = use.input_value
        if ctx.stats is None:
            return "there are no calibration statistics"
        found = ctx.stats.values.get(x.name or "") if x is not None else None
        if found is None:
            return f"the input of {use.path!r} was not observed"
        if not found.finite:
            return f"the input of {use.path!r} holds infinities or NaN"
    return None


def _not_ready(unit: _units.Unit, ctx: Context) -> str | None:
    if ctx.stats is None:
        return "no calibration statistics were given"
    if unit.node.name in ctx.keep_float:
        return "it is kept in float"
    last = _units.folded(unit.out)[0]
    for value in (unit.x, last) if unit.needs_output_codes else (unit.x,):
        found = ctx.stats.values.get(value.name or "")
        if found is None or not found.finite:
            return f"{value.name!r} was not observed as finite numbers"
    return None


TECHNIQUE: Technique = StaticInt8()

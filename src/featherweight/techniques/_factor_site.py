"""What all decompositions share: where they are legal, which ranks are offered, estimates, the way into the graph.

**No gain.** An option must save bytes or operations, names and nodes counted, and one of a site's options must be
worth its error, else the site has none. The measure is rounding: a share s of the values kept in 4 bits takes as many
bytes as all values in 4 s bits; each bit less doubles the step, so that rounding would add 4^(4 (1 - s)) - 1 times
the noise of 4 bits. A decomposition is worth it if it adds less (WORK_WORTH times that where it saves operations
too, which rounding does not), and no more than MOST_NOISE. Flat spectra fail at every rank. Where one rank is worth
it the milder ones are offered too: what they cost in the whole model is for the search to weigh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Scalar, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph.weights import Role, Weight, WeightUse, weights
from featherweight.stats import Statistics
from featherweight.techniques import _absorb, _factor_graph, _noise, _place
from featherweight.techniques._factor import Moments, steadied
from featherweight.techniques._factor_graph import Link
from featherweight.techniques._profile import refusal
from featherweight.techniques._protocol import Context, Estimate

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Params = tuple[int, ...]
#: Options of one site: so many, from this share of the break-even down.
STEPS, TOP, LEAST = 6, 0.9, 0.15
WORK_WORTH = 2.0
MOST_NOISE = 0.5
ROWS_A_SAMPLE = 8
BASE_BITS = 4
#: An error below this share of the output is rounding of float32.
EXACT = 1e-11


@dataclass(frozen=True)
class Layer:
    """A weight as arithmetic sees it: matrix (g, out, k) float64, C or None, sizes of a convolution's kernel.

    `memo` keeps what the candidates of one layer share.
    """

    weight: Weight
    matrix: F64
    moments: Moments
    found: _absorb.Moments
    signal: float
    channels: int
    kernel: tuple[int, ...]
    seed: int
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def tensor(self) -> F64:
        """(g, out, channels, *kernel)."""
        g, out, _ = self.matrix.shape
        return self.matrix.reshape(g, out, self.channels, *self.kernel)


@dataclass(frozen=True)
class Solved:
    """Arrays of the factors in their nodes' layout; as matrices their product is `product` (g, out, k)."""

    arrays: tuple[F32, ...]
    product: F64


@dataclass(frozen=True)
class Method:
    """One decomposition: names of its parameters, where it applies, its candidates, their errors, the factors.

    `kernels`: only for kernels of more than one position; `why`: why a weight has no factors ('' if it may);
    `propose`: parameters worth a look; `shapes`: of the factors; `errors`: tr(dW C dW^T) of each; `solve`: the
    factors; `links`: the layers at one use.
    """

    name: str
    params: tuple[str, ...]
    roles: frozenset[Role]
    kernels: bool
    why: Callable[[Weight], str]
    propose: Callable[[Layer], Sequence[Params]]
    shapes: Callable[[Layer, Params], Sequence[tuple[int, ...]]]
    errors: Callable[[Layer, Sequence[Params]], Sequence[float]]
    solve: Callable[[Layer, Params], Solved]
    links: Callable[[Weight, Params], Callable[[WeightUse], Sequence[Link]]]


@dataclass(frozen=True)
class Ranked:
    """What each option of one weight costs, and the noise of the weight in BASE_BITS."""

    estimates: dict[Params, Estimate]
    rounding: float


def ladder(most: int) -> list[int]:
    """About STEPS ranks in geometric steps from TOP * most down, multiples of 8 where the layer is wide."""
    unit = 8 if most >= 48 else 4 if most >= 24 else 1
    found = []
    for i in range(STEPS):
        rank = most * TOP * (LEAST / TOP) ** (i / (STEPS - 1))
        found.append(max(int(rank) // unit * unit, min(unit, most)))
    return sorted({r for r in found if r >= 1}, reverse=True)


def sites(method: Method, model: ir.Model) -> Iterator[Site]:
    """Those weight sites (`_place.sites`) that are of the kind that the method takes apart."""
    known = {w.name: w for w in weights(model)}
    for site in _place.sites(model):
        if any(use.role in method.roles and _wide(known[site.name], use, method) for use in known[site.name].uses):
            yield site


def _wide(weight: Weight, use: WeightUse, method: Method) -> bool:
    return not method.kernels or math.prod(weight.seen_shape(use)[2:]) > 1


def reason(method: Method, weight: Weight, ctx: Context) -> str:
    """Why the weight is left alone, or ''."""
    asked = refusal(weight, ctx)
    if asked:
        return f"its layers stay as they are: {asked}"
    roles = {use.role for use in weight.uses}
    if len(roles) > 1:
        return f"it is used in several ways ({', '.join(sorted(roles))}), so one factorisation cannot serve all"
    role = weight.uses[0].role
    if role not in method.roles:
        wanted = ", ".join(sorted(method.roles))
        return f"{method.name} takes apart {wanted} weights; this one is of the kind {role}"
    if len({_view(use) for use in weight.uses}) > 1:
        return "its uses read it in different layouts, so one factorisation cannot serve all"
    if weight.value.is_graph_output() or _other_readers(weight):
        return "the stored tensor is also read in another way, so it would have to stay beside its factors"
    return method.why(weight)


def _view(use: WeightUse) -> tuple[Any, ...]:
    flag = use.node.attributes.get("transB") if use.role == "gemm" else None
    perms = tuple(str(node.attributes.get("perm")) for node in use.layout)
    return use.role, use.groups, use.index, perms, 0 if flag is None else flag.as_int()


def _other_readers(weight: Weight) -> bool:
    """True if something reads the tensor, or its transposed form, that is not one of the uses."""
    uses = {(use.node, use.index) for use in weight.uses}
    layout = {node for use in weight.uses for node in use.layout}
    todo, seen = [weight.value], set()
    while todo:
        value = todo.pop()
        if value is not weight.value and value.is_graph_output():
            return True
        for reader in value.uses():
            if (reader.node, reader.idx) in uses:
                continue
            passes = reader.node in layout or reader.node.op_type == "Identity"
            if not passes:
                return True
            if reader.node not in seen:
                seen.add(reader.node)
                todo.extend(reader.node.outputs)
    return False


def layer(weight: Weight, ctx: Context) -> Layer:
    """The weight with its second moments, made ready."""
    matrix = weight.to_matrix(weight.array())
    found = _absorb.moments(weight, ctx)
    moments = None
    if found.matrix is not None and ctx.stats is not None:
        # Where no bias takes the mean it stays in the moments, and is known well from any rows.
        mean = ctx.stats.mean(weight.name) if found.mean is None else None
        moments = steadied(found.matrix, mean, independent_rows(weight, ctx.stats))
    use = weight.main_use
    kernel = weight.seen_shape(use)[2:] if use.role in ("conv", "conv_transpose") else ()
    channels = matrix.shape[2] // math.prod(kernel)
    signal = _absorb.signal(matrix, found, weight, ctx)
    return Layer(weight, matrix.astype(np.float64), moments, found, signal, channels, kernel, ctx.seed)


def independent_rows(weight: Weight, stats: Statistics) -> int:
    """As how many independent rows those of a weight's moments may count; positions of one map resemble each other.

    In maps of 7 x 7 about 8 a sample, more in larger ones: measured on EfficientNet-Lite0 with 64 images, where the
    error found on other images is then the predicted one (medians over its layers within 3 % at every rank); with all
    rows counted it was 7 times that in the last layer. Rows of matrix products count in full (MiniLM, 192 texts).
    """
    rows, use = stats.n_rows(weight.name), weight.main_use
    value = stats.values.get(use.input_value.name or "") if use.input_value is not None else None
    if value is None or use.role not in ("conv", "conv_transpose"):
        return rows
    positions = math.prod(_factor_graph.window(use, weight).layout(value.shape[2:])[1])
    return min(rows, stats.n_samples * max(ROWS_A_SAMPLE, positions // ROWS_A_SAMPLE))


def four_bits(of: Layer) -> float:
    """Noise of the weight rounded to BASE_BITS with error feedback, in closed form (`_noise`)."""
    g, _, k = of.matrix.shape
    second = np.ones((g, k)) if of.moments is None else of.moments
    step = _noise.steps(of.matrix.astype(np.float32), BASE_BITS, None)
    error = float((np.square(step) * _noise.pivots(second)[:, None]).sum()) / 12 * _noise.CLIPPED[BASE_BITS]
    return error / of.signal if of.signal > 0 else 0.0


def worth(noise: float, share: float, work: float, rounding: float) -> bool:
    """Whether an option's noise is worth the bytes and operations it saves (see the module's text)."""
    if noise <= EXACT * 100:
        return share < 1 or work < 1
    price = rounding * (4.0 ** (BASE_BITS * max(1 - share, 0.0)) - 1)
    price *= WORK_WORTH if work < 1 else 1.0
    return bool(noise <= min(price, MOST_NOISE))


def candidates(method: Method, model: ir.Model, weight: Weight, ctx: Context) -> Ranked:
    """Every option that saves bytes or operations, with its estimate; made once a weight."""
    key = (method.name, ctx.stats.key if ctx.stats else "", weight.name, weight.shape)
    cached = ctx.cache.get(key)
    if cached is None or cached[0] is not model:
        of = layer(weight, ctx)
        saving = []
        for params in method.propose(of):
            size, work = _costs(method, model, of, params, ctx)
            if size < weight.size_bytes or work < 1:
                saving.append((params, size, work))
        errors = method.errors(of, [s[0] for s in saving]) if saving else []
        found = {
            params: Estimate(size, _relative(error, of), work)
            for (params, size, work), error in zip(saving, errors, strict=True)
        }
        cached = ctx.cache[key] = (model, Ranked(found, four_bits(of) if found else 0.0))
    ranked: Ranked = cached[1]
    return ranked


def _relative(error: float, of: Layer) -> float:
    return max(error, 0.0) / of.signal if of.signal > 0 else 0.0


def _costs(method: Method, model: ir.Model, of: Layer, params: Params, ctx: Context) -> tuple[int, float]:
    shapes = method.shapes(of, params)
    size = _factor_graph.size_bytes(of.weight, shapes)
    if of.found.mean is not None:
        size += _absorb.added_bytes(_absorb.slot(of.weight))
    return size, _factor_graph.work(model, of.weight, shapes, method.links(of.weight, params), ctx)


def options(method: Method, model: ir.Model, site: Site, ctx: Context) -> list[Action]:
    """Legal actions that are worth their error; where there is none a note says why."""
    weight = ctx.weight(model, site.name)
    why = reason(method, weight, ctx)
    if why:
        ctx.note(site.name, why)
        return []
    known = candidates(method, model, weight, ctx)
    if not known.estimates:
        ctx.note(site.name, f"no gain: {method.name} saves neither bytes nor operations at any rank")
        return []
    size = max(weight.size_bytes, 1)
    if not any(worth(e.noise, e.size_bytes / size, e.work, known.rounding) for e in known.estimates.values()):
        ctx.note(site.name, f"no gain: {method.name} loses more at every rank than fewer bits would for what it saves")
        return []
    found = [params for params, e in known.estimates.items() if e.noise <= MOST_NOISE]
    return [Action.of(method.name, **dict(zip(method.params, params, strict=True))) for params in found]


def estimate(method: Method, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
    """Bytes, noise and work of one option."""
    weight = ctx.weight(model, site.name)
    params = _params(method, action)
    known = candidates(method, model, weight, ctx).estimates
    if params not in known:
        _refuse(method, weight, ctx)
        of = layer(weight, ctx)
        size, work = _costs(method, model, of, params, ctx)
        known[params] = Estimate(size, _relative(method.errors(of, [params])[0], of), work)
    return known[params]


def apply(method: Method, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
    """Factorise, put the mean error into the bias, replace the layers; one site a factor.

    Where channels were cut since the option was chosen and it saves nothing any more, the layer stays as it is.
    """
    weight = _place.find(model, site.name)
    _refuse(method, weight, ctx)
    params = _params(method, action)
    of = layer(weight, ctx)
    shapes = method.shapes(of, params)
    if sum(map(math.prod, shapes)) >= of.matrix.size and _costs(method, model, of, params, ctx)[1] >= 1:
        ctx.note(site.name, f"no gain: {action} saves nothing now that channels of it are gone; it stays as it is")
        return (site,)
    return factorise(method, model, of, params)


def factorise(method: Method, model: ir.Model, of: Layer, params: Params) -> tuple[Site, ...]:
    """Replace the layer by its factors, whether that saves anything or not."""
    solved, weight = method.solve(of, params), of.weight
    error = (of.matrix - solved.product).astype(np.float32)
    shift, place = _absorb.mean_shift(error, of.found), _absorb.slot(weight)
    if shift is not None and place is not None:
        _absorb.absorb(model, place, shift, weight.name)
    return _factor_graph.replace(model, weight, solved.arrays, method.links(weight, params))


def _refuse(method: Method, weight: Weight, ctx: Context) -> None:
    why = reason(method, weight, ctx)
    if why:
        raise TechniqueError(f"{method.name} cannot take {weight.name!r} apart: {why}")


def _params(method: Method, action: Action) -> Params:
    """The ranks of an action, checked. Raises TechniqueError."""
    found = []
    for name in method.params:
        value: Scalar | None = action.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TechniqueError(f"{name} of {method.name} must be a whole number >= 1, but got {value!r}")
        found.append(value)
    return tuple(found)


class Decomposition:
    """A technique that is one Method: a subclass gives its name, the number of its factors, and the method."""

    name: ClassVar[str]
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False
    factors: ClassVar[int]
    method: ClassVar[Method]

    def sites(self, model: ir.Model) -> Iterator[Site]:
        """Stored weights of the right kind, in sub-graphs too."""
        return sites(self.method, model)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> list[Action]:
        """A few sizes below the break-even; none, with a note, where none is worth its error."""
        return options(self.method, model, site, ctx)

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Bytes and operations from shapes; noise in closed form."""
        return estimate(self.method, model, site, action, ctx)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Replace the layer by its factors, a site each."""
        return apply(self.method, model, site, action, ctx)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""

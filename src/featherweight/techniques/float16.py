"""Weights stored as float16 and widened at load: half the bytes at the speed and nearly the results of float32.

With `compute=true` on the site of kind "model" the whole graph computes in float16 instead (`_half`), for targets
that have such kernels; most CPUs do not, so it is never listed as a site of its own accord.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import encode, io
from featherweight.techniques import _half, _place
from featherweight.techniques._profile import profile, refusal
from featherweight.techniques._protocol import Context, Estimate, Technique

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_normal)
#: More than this share of a tensor's energy below float16's normal range is a loss, not rounding.
UNDERFLOW_SHARE = 1e-3


class Float16:
    """See the module's text."""

    name: ClassVar[str] = "float16"
    stage: ClassVar[Stage] = "numeric"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every stored float32 weight."""
        return _place.sites(model)

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """float16 if the values fit; for a site of kind "model" half-precision compute."""
        if site.kind == "model":
            return [Action.of(self.name, compute=True)]
        weight = ctx.weight(model, site.name)
        reason = refusal(weight, ctx) or misfit(weight.array())
        if reason:
            ctx.note(site.name, f"not stored as float16: {reason}")
            return []
        return [Action.of(self.name)]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact bytes; noise is the rounding of a sample of rows."""
        if action.get("compute", False):
            floats = sum(v.const_value.size for v in _float_initializers(model) if v.const_value is not None)
            return Estimate(max(site.size_bytes - 2 * floats, 0), 2.0**-20)
        weight = ctx.weight(model, site.name)
        size = encode.sizes(weight.shape, "float16", 16)
        facts = profile(weight, ctx)
        if facts.signal <= 0:
            return Estimate(size, 0.0)
        with np.errstate(over="ignore"):
            error = facts.rows - facts.rows.astype(np.float16).astype(np.float32)
        noise = np.einsum("gk,gok,gok,o->", facts.importance, error, error, facts.row_weight[0], dtype=np.float64)
        return Estimate(size, float(noise) / facts.signal)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Store the tensor as float16 behind a Cast, or convert the whole model."""
        if action.get("compute", False):
            if site.kind != "model":
                raise TechniqueError(
                    f"compute=true converts a whole model, but the site {site.name!r} is a {site.kind}"
                )
            _half.convert(model, ctx)
            return (Site(site.name, "model", site.tensors, site.nodes, len(io.to_bytes(model))),)
        weight = _place.find(model, site.name)
        reason = refusal(weight, ctx) or misfit(weight.array())
        if reason:
            raise TechniqueError(f"float16 cannot store {site.name!r}: {reason}")
        coded = encode.float16(weight.array())
        stored = encode.attach(model, weight.value, coded)
        return (Site(site.name, "weight", (stored.name or "",), site.nodes, coded.nbytes),)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Nothing is left to do."""


def misfit(values: npt.NDArray[np.float32]) -> str:
    """Why float16 cannot hold these values, or ''."""
    size = np.abs(values)
    if float(size.max()) > LARGEST:
        return f"its largest magnitude {float(size.max()):.4g} is above float16's {LARGEST:.0f}"
    small = size[size < SMALLEST].astype(np.float64)
    lost = float(np.square(small).sum())
    if lost > UNDERFLOW_SHARE * float(np.square(size, dtype=np.float64).sum()):
        return f"{small.size} of {size.size} values are below float16's normal range, which ends at {SMALLEST:.2g}"
    return ""


def _float_initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from (v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT)


TECHNIQUE: Technique = Float16()

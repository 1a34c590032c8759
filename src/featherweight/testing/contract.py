"""What every technique must hold, as a test class: subclass it, name the technique, run pytest.

```python
from featherweight.testing.contract import TechniqueContract

class TestMine(TechniqueContract):
    technique = "mine"
```

Every option at every site of the small models in `graphs` is applied alone to a copy, saved, and run on the
runtime. Promises about numbers use an oracle that shares no code with techniques: the weight is read out of the
saved file by the runtime and compared with the original under brute-force second moments of the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import pytest

from featherweight.core import Action, Profile, Site
from featherweight.graph import io, surgery
from featherweight.graph import weights as graph_weights
from featherweight.runtime import ort
from featherweight.stats import Statistics, collect
from featherweight.techniques import Context, Estimate, Technique, get
from featherweight.testing import graphs

Array = npt.NDArray[Any]
PROFILE = Profile("contract", "x86_64", 1, 1 << 33, int8_dot=False)


@dataclass(frozen=True)
class Trial:
    """One option applied alone to a copy of one small model."""

    site: Site
    action: Action
    estimate: Estimate
    left: tuple[Site, ...]
    saved: bytes
    outputs: tuple[Mapping[str, Array], ...]

    def __str__(self) -> str:
        return f"{self.site.name}: {self.action}"


@functools.cache
def prepared(name: str) -> tuple[graphs.Small, Statistics, tuple[Mapping[str, Array], ...]]:
    """A small model, its calibration statistics and its float outputs; made once a process."""
    small = graphs.build(name)
    stats = collect(small.model, list(small.feeds), seed=0)
    loaded = ort.session(io.to_bytes(small.model))
    return small, stats, tuple(loaded.run(feed) for feed in small.feeds)


def context(stats: Statistics | None) -> Context:
    """A context for the target without integer dot products."""
    return Context(profile=PROFILE, stats=stats, seed=0)


def trial(technique: Technique, small: graphs.Small, site: Site, action: Action, ctx: Context) -> Trial:
    """Apply, finish, save, check, run."""
    estimate = technique.estimate(small.model, site, action, ctx)
    copy = surgery.copy_model(small.model)
    left = technique.apply(copy, site, action, ctx)
    technique.finish(copy, ctx)
    saved = io.to_bytes(copy)
    onnx.checker.check_model(onnx.load_from_string(saved), full_check=True)
    loaded = ort.session(saved)
    return Trial(site, action, estimate, left, saved, tuple(loaded.run(feed) for feed in small.feeds))


def stored_weight(saved: bytes, name: str) -> Array | None:
    """The value called `name` of the saved model as the runtime computes it; None if it is not in the main graph."""
    model = ir.from_proto(onnx.load_from_string(saved))
    made = {o.name: o for node in model.graph for o in node.outputs}
    value = made.get(name) or model.graph.initializers.get(name)
    if value is None:
        return None
    if value.is_initializer() and value.const_value is not None:
        return value.const_value.numpy()
    model.graph.outputs.clear()
    model.graph.outputs.append(value)
    surgery.remove_unused(model)
    model.graph.inputs.clear()
    return ort.session(io.to_bytes(model)).run({})[name]


@functools.cache
def trials(technique_name: str, model: str, most_options: int) -> list[Trial]:
    """Every option (thinned out evenly) at every site of one small model; made once a process."""
    technique = get(technique_name)
    small, stats, _ = prepared(model)
    before = io.to_bytes(small.model)
    done = []
    for site in technique.sites(small.model):
        ctx = context(stats)
        options = list(technique.options(small.model, site, ctx))
        assert options or ctx.notes, f"no option at {site.name} must leave a note that says why"
        step = max(1, -(-len(options) // most_options))
        done += [trial(technique, small, site, action, ctx) for action in options[::step]]
    assert io.to_bytes(small.model) == before, "the caller's model must not change"
    return done


def layer_noise(t: Trial, model: str) -> float | None:
    """E||dy - mean dy||^2 / E||y - mean y||^2 of the layer whose weight was replaced, on the feeds, by the runtime.

    None where the weight is still there, has several uses or lies in a sub-graph.
    """
    small, _, _ = prepared(model)
    weight = next((w for w in graph_weights.weights(small.model) if w.name == t.site.name), None)
    if weight is None or len(weight.uses) > 1 or stored_weight(t.saved, weight.name) is not None:
        return None
    use = weight.uses[0]
    before = value_of(io.to_bytes(small.model), use.node.outputs[0].name or "", small.feeds)
    after = value_of(t.saved, use.node.outputs[0].name or "", small.feeds)
    if before is None or after is None:
        return None
    axis = {"conv": 1, "conv_transpose": 1, "matmul_left": before.ndim - 2}.get(use.role, before.ndim - 1)
    y, dy = (np.moveaxis(v.astype(np.float64), axis, 0).reshape(v.shape[axis], -1) for v in (before, after - before))
    whole = float(np.square(y - y.mean(axis=1, keepdims=True)).sum())
    return float(np.square(dy - dy.mean(axis=1, keepdims=True)).sum()) / whole if whole > 0 else None


def value_of(saved: bytes, name: str, feeds: Sequence[Mapping[str, Array]]) -> Array | None:
    """The activation called `name` of a saved model over all feeds, joined along axis 0; None if it has none."""
    model = ir.from_proto(onnx.load_from_string(saved))
    value = next((o for node in model.graph for o in node.outputs if o.name == name), None)
    if value is None:
        return None
    model.graph.outputs.clear()
    model.graph.outputs.append(value)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    loaded = ort.session(io.to_bytes(model))
    return np.concatenate([loaded.run(feed)[name] for feed in feeds])


class TechniqueContract:
    """Promises of every technique. `technique` is its name; `models` the small models it is tried on.

    `most_options`: how many options of a site are tried, evenly spread. `size_slack_bytes`: how far the estimate of
    bytes may be off. `noise_factor`: how many times the noise found may exceed its estimate. `plain_per_channel`:
    whether plain rounding, which must not be better, has a scale for each channel or one for all.
    """

    technique: ClassVar[str] = ""
    models: ClassVar[tuple[str, ...]] = graphs.NAMES
    most_options: ClassVar[int] = 7
    size_slack_bytes: ClassVar[int] = 300
    noise_factor: ClassVar[float] = 4.0
    plain_per_channel: ClassVar[bool] = True

    @pytest.fixture(params=graphs.NAMES)
    def model(self, request: pytest.FixtureRequest) -> str:
        """Name of a small model on which the technique has options."""
        name = str(request.param)
        if name not in self.models or not self._trials(name):
            pytest.skip(f"{self.technique} has nothing to do in {name}")
        return name

    @classmethod
    def _trials(cls, model: str) -> list[Trial]:
        return trials(cls.technique, model, cls.most_options)

    def test_interface_is_kept_and_outputs_are_finite(self, model: str) -> None:
        """Same output names and shapes, no NaN or infinity."""
        _, _, floats = prepared(model)
        for t in self._trials(model):
            for found, wanted in zip(t.outputs, floats, strict=True):
                assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
                    k: (v.shape, v.dtype) for k, v in wanted.items()
                }, str(t)
                assert all(np.isfinite(v).all() for v in found.values()), str(t)

    def test_bytes_are_as_estimated(self, model: str) -> None:
        """The file grows or shrinks by what the estimate says."""
        small, _, _ = prepared(model)
        whole = len(io.to_bytes(small.model))
        for t in self._trials(model):
            expected = whole - t.site.size_bytes + t.estimate.size_bytes
            shared = 1600  # tables that all encodings of one model share are written with the first
            assert -self.size_slack_bytes <= len(t.saved) - expected <= self.size_slack_bytes + shared, (
                f"{t}: {len(t.saved)} B, estimated {expected} B"
            )

    def test_noise_is_near_the_estimate(self, model: str) -> None:
        """The weight in the file, under brute-force moments, is about as far off as estimated.

        Where the structure changed and no such weight is left, what the layer puts out is compared.
        """
        for t in self._trials(model):
            noise = self._weight_noise(t, model)
            if noise is None and get(self.technique).stage == "structure":
                noise = layer_noise(t, model)
            if noise is not None:
                assert noise <= self.noise_factor * t.estimate.noise + 1e-6, (
                    f"{t}: found {noise:.3g}, estimated {t.estimate.noise:.3g}"
                )

    def test_rounding_is_no_worse_than_plain(self, model: str) -> None:
        """No weight is further from the original than plain rounding to as many bits leaves it (a scale twice too
        big, lost rows, swapped axes and zeroed weights all fail here).
        """
        for t in self._trials(model):
            bits = t.action.get("bits", t.action.get("weight_bits", None))
            noise = self._weight_noise(t, model, plain_bits=None)
            plain = self._weight_noise(t, model, plain_bits=int(bits or 8)) if bits != 1 else None
            if noise is not None and plain is not None:
                assert noise <= 1.02 * plain + 1e-6, f"{t}: {noise:.3g}, plain rounding {plain:.3g}"

    def test_same_seed_gives_same_bytes(self, model: str) -> None:
        """A fresh context, and the action after a round trip through JSON, give the same file."""
        technique = get(self.technique)
        small, stats, _ = prepared(model)
        for t in self._trials(model)[::5]:
            action = Action.from_json(t.action.to_json())
            assert action == t.action
            again = trial(technique, small, t.site, action, context(stats))
            assert again.saved == t.saved, f"{t}: the same action gave other bytes"

    def test_works_without_statistics(self, model: str) -> None:
        """No calibration data: still a legal model, or no option and a note."""
        technique = get(self.technique)
        small, _, _ = prepared(model)
        for site in technique.sites(small.model):
            ctx = context(None)
            options = list(technique.options(small.model, site, ctx))
            assert options or ctx.notes
            for action in options[:1]:
                t = trial(technique, small, site, action, ctx)
                assert all(np.isfinite(v).all() for out in t.outputs for v in out.values()), str(t)

    def test_zero_rows_stay_zero(self, model: str) -> None:
        """Dead channels and padding rows, exactly zero in the original, are exactly zero in the file."""
        small, _, _ = prepared(model)
        originals = {w.name: w for w in graph_weights.weights(small.model)}
        for t in self._trials(model):
            weight = originals.get(t.site.name)
            found = None if weight is None else stored_weight(t.saved, t.site.name)
            if weight is not None and found is not None and found.dtype == np.float32:
                rows = ~weight.to_matrix(weight.array()).any(axis=2)
                assert not weight.to_matrix(found)[rows].any(), str(t)

    def _weight_noise(self, t: Trial, model: str, *, plain_bits: int | None = None) -> float | None:
        """Relative output error of the weight in the file (or of plain rounding), inputs as observed.

        None where the site is no weight with observed inputs or the file holds it in another form.
        """
        small, stats, _ = prepared(model)
        weight = next((w for w in graph_weights.weights(small.model) if w.name == t.site.name), None)
        second = None if weight is None else stats.second_moment(weight.name)
        mean = None if weight is None else stats.mean(weight.name)
        if weight is None or second is None or mean is None or second.ndim != 3 or len(weight.uses) > 1:
            return None
        matrix = weight.to_matrix(weight.array()).astype(np.float64)
        if plain_bits is None:
            stored = stored_weight(t.saved, t.site.name)
            if stored is None or stored.dtype != np.float32 or stored.shape != weight.shape:
                return None
            other = weight.to_matrix(stored).astype(np.float64)
        else:
            top = 2 ** (plain_bits - 1) - 1
            step = np.abs(matrix).max(axis=2 if self.plain_per_channel else (0, 1, 2), keepdims=True) / top
            other = np.rint(matrix / np.where(step > 0, step, 1)) * step
        error = matrix - other
        spread = second - mean[:, :, None] * mean[:, None, :]
        found = sum(float(row @ spread[g] @ row) for g in range(len(error)) for row in error[g])
        whole = sum(float(row @ spread[g] @ row) for g in range(len(matrix)) for row in matrix[g])
        return max(found, 0.0) / whole if whole > 0 else None

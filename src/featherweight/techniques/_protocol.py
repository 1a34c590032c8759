"""What every technique is: the protocol, the context it is given and the estimate it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import onnx_ir as ir

from featherweight.core import Action, Note, Profile, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import cost
from featherweight.graph.weights import Weight, weights

if TYPE_CHECKING:
    from featherweight.stats import Statistics


LISTED, COUNTED = "weights of the model being estimated", "costs of the model being estimated"


@dataclass
class Context:
    """What techniques know besides the model.

    `profile` is the target; `stats` the calibration statistics of the model the sites were listed on (None: a
    technique must work without, e.g. by rounding to nearest); `keep_float` the names of nodes the user or an
    earlier measurement wants in float; `fragile` those that may be stored in few bits but not computed in integers
    (see `for_technique`); `notes` collects why something was left alone; `cache` shares arithmetic
    between `estimate` and `apply`, keyed by (model sha, site, action); `thorough` False lets `options` leave out what
    another technique nearly always does better, so that the search need not estimate it; `input_shapes` concrete
    shapes of the model's inputs, for counting operations and following channels (empty: those of the graph);
    `gains` how much of the noise at a weight reaches the outputs (missing: as much as at any other).
    """

    profile: Profile
    stats: Statistics | None = None
    seed: int = 0
    keep_float: frozenset[str] = frozenset()
    fragile: frozenset[str] = frozenset()
    notes: list[Note] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)
    thorough: bool = True
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)

    def for_technique(self, technique: Technique) -> Context:
        """The context a technique should see: for those that compute in integers, fragile nodes stay in float."""
        if not technique.integer or not self.fragile:
            return self
        return dataclasses.replace(self, keep_float=self.keep_float | self.fragile)

    def weight(self, model: ir.Model, name: str) -> Weight:
        """The weight called `name`, enumerated once a model: for options and estimates, which leave the model alone.

        Raises TechniqueError if the model has none.
        """
        known = self.cache.get(LISTED)
        if known is None or known[0] is not model:
            known = self.cache[LISTED] = (model, {w.name: w for w in weights(model)})
        if name not in known[1]:
            raise TechniqueError(f"a site must be a float weight of the model, but there is none called {name!r}")
        found: Weight = known[1][name]
        return found

    def costs(self, model: ir.Model) -> cost.Costs:
        """Operations and memory of `model` at the data's shapes, counted once a model: for options and estimates."""
        known = self.cache.get(COUNTED)
        if known is None or known[0] is not model:
            counted = cost.costs(model, input_shapes=dict(self.input_shapes) or None)
            known = self.cache[COUNTED] = (model, counted)
        found: cost.Costs = known[1]
        return found

    def note(self, where: str, text: str) -> None:
        """Record one note; the same note is kept once."""
        entry = Note(where, text)
        if entry not in self.notes:
            self.notes.append(entry)


@dataclass(frozen=True)
class Estimate:
    """Predicted effect of one action at one site.

    `size_bytes`: the bytes of the site afterwards (not a difference). `noise`: E||dy||^2 / E||y - mean y||^2 at
    the outputs of the site's consumers, in closed form: tr(dW C dW^T) plus the rounding noise of the activation
    where the action computes in integers. `work`: multiply-accumulates of the site's nodes afterwards over before.
    `at`: for a group of channels, the noise at each weight that reads them (`noise` is then the sum).
    `activation_bytes`: change of the planned peak of activations, where the technique knows it.
    """

    size_bytes: int
    noise: float
    work: float = 1.0
    at: tuple[tuple[str, float], ...] = ()
    activation_bytes: int = 0


@runtime_checkable
class Technique(Protocol):
    """A way to make a model cheaper. One file `techniques/<name>.py` ends with `TECHNIQUE = Class()`.

    `integer`: its nodes multiply integers; otherwise it only stores weights in fewer bits, computed in float.

    A structure technique may also have (the search asks with getattr): `factors: int`, layers in the place of one;
    `channels(model, site, action, ctx) -> int`, the width left in the widest layer of a group, as odd widths are slow;
    `preview(model, site, action, ctx) -> ir.Model`, a model that answers as after the action and is cheaper to make.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    integer: ClassVar[bool]

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Places where this technique could act, in topological order of first use."""
        ...

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """Legal actions at `site`; an empty list leaves a note in `ctx` that says why."""
        ...

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Predict, by arithmetic only, what `action` costs."""
        ...

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Edit `model` in place (the caller copies) and return the site as it is now.

        Raises:
            TechniqueError: the action is not legal at this site.
        """
        ...

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Called once after all sites of the technique were applied: glue nodes, bias correction."""
        ...


def integer_names(techniques: Iterable[Technique]) -> frozenset[str]:
    """Names of those that compute in integers."""
    return frozenset(t.name for t in techniques if t.integer)

"""Whole residual branches left out: `y = x + f(x)` becomes `y = x` (Huang 2016; Fan 2020; Wang & Wu 2022).

A network that was trained with stochastic depth (Huang 2016, arXiv:1603.09382) hardly notices a branch that is missing,
and nothing saves more time: the nodes are gone, not thinner. With few data such a network is also easier to teach than
one with thinner layers (Wang & Wu 2022, arXiv:2202.07861). A site is one branch, found from the graph alone
(`graph.branches`). What a branch is worth does not follow from its weights: the search runs the model without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import branches, surgery
from featherweight.graph.branches import Branch
from featherweight.techniques._protocol import Context, Estimate, Technique

PENDING = "featherweight.depth_prune"
#: Noise over signal of a branch left out, before a run has said what it is.
UNKNOWN = 1.0


class DepthPrune:
    """See the module's text. Sites are residual branches, named after the addition at their end."""

    name: ClassVar[str] = "depth_prune"
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False
    settles: ClassVar[int] = 4

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every residual branch."""
        paths = surgery.paths(model)
        return [
            Site(
                branch.name,
                "branch",
                tuple(v.name or "" for v in branch.tensors),
                tuple(paths[node] for node in branch.nodes),
                sum(v.const_value.nbytes for v in branch.tensors if v.const_value is not None),
            )
            for branch in branches.residual(model)
        ]

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:  # noqa: ARG002 - the protocol
        """To leave it out, unless a layer in it was asked to stay."""
        asked = sorted(ctx.keep_float.intersection(site.nodes))
        if asked:
            ctx.note(site.name, f"its branch stays: {asked[0]} was asked to stay as it is")
            return []
        return [Action.of(self.name)]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:  # noqa: ARG002 - the protocol
        """Nothing is left; the noise is a guess, as only a run can tell."""
        return Estimate(0, UNKNOWN, 0.0)

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:  # noqa: ARG002 - the protocol
        """Remember the choice; `finish` removes all branches at once. Raises TechniqueError where there is none."""
        _chosen(model, [site.name])
        pending = json.loads(model.graph.metadata_props.get(PENDING, "[]"))
        model.graph.metadata_props[PENDING] = json.dumps([*pending, site.name])
        return (site,)

    def preview(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> ir.Model:  # noqa: ARG002 - the protocol
        """A copy without the branch."""
        copy = surgery.copy_model(model)
        _remove(copy, [site.name])
        return copy

    def finish(self, model: ir.Model, ctx: Context) -> None:  # noqa: ARG002 - the protocol
        """Remove the branches."""
        pending = json.loads(model.graph.metadata_props.pop(PENDING, "[]"))
        if pending:
            _remove(model, pending)


def _remove(model: ir.Model, names: Iterable[str]) -> None:
    branches.leave_out(_chosen(model, names))
    surgery.remove_unused(model)


def _chosen(model: ir.Model, names: Iterable[str]) -> list[Branch]:
    """The branches called so, in the order of the graph. Raises TechniqueError if one is none."""
    known = {branch.name: branch for branch in branches.residual(model)}
    wanted = set(names)
    unknown = sorted(wanted - known.keys())
    if unknown:
        raise TechniqueError(f"a site must be a residual branch of this model, but {unknown[0]!r} is none")
    return [branch for name, branch in known.items() if name in wanted]


TECHNIQUE: Technique = DepthPrune()

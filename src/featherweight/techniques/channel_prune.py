"""Channels removed for real: shapes shrink, what is left makes up for what is gone (He 2017; Fang 2023; Frantar 2022).

A site is a group of coupled channels, as the channel-index engine finds them in any graph: an option says how many
units stay. Which ones go is chosen by the closed-form error at the layers that read them; their weights are solved
anew by ridge least squares with the calibration statistics (`_prune`). All groups of a plan are cut at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.errors import TechniqueError
from featherweight.graph import channels as ch
from featherweight.graph import surgery
from featherweight.techniques import _ends, _prune
from featherweight.techniques._protocol import Context, Estimate, Technique

PENDING = "featherweight.channel_prune"


class ChannelPrune:
    """See the module's text. Sites are groups of coupled channels."""

    name: ClassVar[str] = "channel_prune"
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterable[Site]:
        """Every group from which something can be removed."""
        return [_prune.site_of(model, group) for group in ch.analyse(model).groups]

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        """Unit counts to keep: multiples of 8 channels in wide groups; fewer than all, never none."""
        channels = _prune.analysis(model, ctx)
        group = _prune.group_of(channels, site.name)
        asked = sorted(ctx.keep_float.intersection(group.nodes))
        if asked:
            ctx.note(site.name, f"its channels stay: {asked[0]} was asked to stay as it is")
            return []
        found = _prune.ranked(model, group, ctx)
        widths = _prune.widths(group, channels, found, thorough=ctx.thorough)
        if not widths:
            ctx.note(site.name, f"no gain: none of its {len(group.units)} units can go without emptying a layer")
        return [Action.of(self.name, keep=keep) for keep in widths]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        """Exact bytes and operations of this group alone; noise at each reader in closed form."""
        channels = _prune.analysis(model, ctx)
        found = _prune.ranked(model, _prune.group_of(channels, site.name), ctx)
        keep = _keep(action, found)
        gone = channels.gone(found.removed(keep))
        shares = channels.bytes_left(gone)
        stored = {v.name: v for g in model.graphs() for v in g.initializers.values()}
        size = sum(
            tensor.nbytes * shares.get(name, 1.0)
            for name in site.tensors
            if (tensor := stored[name].const_value) is not None
        )
        counted, before, after = _prune.macs(model, ctx), 0.0, 0.0
        for node in channels.following.work:
            where = channels.following.where(node)
            if where in site.nodes:
                before += counted.get(where, 0)
                after += counted.get(where, 0) * channels.work_left(node, gone)
        noise: dict[str, float] = {}
        for source, value in zip(found.tensors, found.noise_at(keep), strict=True):
            noise[source] = noise.get(source, 0.0) + float(value)
        work = after / before if before else 1.0
        return Estimate(int(size), sum(noise.values()), work, tuple(noise.items()))

    def channels(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> int:
        """Channels that stay where the group is widest: what the kernels' multiples are about."""
        channels = _prune.analysis(model, ctx)
        return int(action.get("keep", 0)) * int(channels.width(_prune.group_of(channels, site.name)))

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        """Remember the choice; `finish` cuts all groups at once."""
        found = _prune.ranked(model, _prune.group_of(_prune.analysis(model, ctx), site.name), ctx)
        pending = json.loads(model.graph.metadata_props.get(PENDING, "{}"))
        pending[site.name] = _keep(action, found)
        model.graph.metadata_props[PENDING] = json.dumps(pending)
        return (site,)

    def preview(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> ir.Model:
        """A copy that answers as the cut model would, with zeros where channels would go: no cutting, so cheaper.

        Where channels end without a reader there is nothing to put zeros in, so they are cut.
        """
        channels = _prune.analysis(model, ctx)
        found, copy = _prune.ranked(model, _prune.group_of(channels, site.name), ctx), surgery.copy_model(model)
        if _ends.ending(channels, found.group).any():
            self.apply(copy, site, action, ctx)
            self.finish(copy, ctx)
        else:
            _prune.compensate(copy, [(found, _keep(action, found))], ctx)
        return copy

    def finish(self, model: ir.Model, ctx: Context) -> None:
        """Solve the readers' weights anew, then cut."""
        pending = json.loads(model.graph.metadata_props.pop(PENDING, "{}"))
        if not pending:
            return
        chosen = [
            (_prune.ranked(model, _prune.group_of(_prune.analysis(model, ctx), name), ctx), int(keep))
            for name, keep in pending.items()
        ]
        channels = _prune.analysis(model, ctx)
        removed = np.concatenate([found.removed(keep) for found, keep in chosen])
        why = ch.cuttable(channels, removed)
        if why:
            raise TechniqueError(f"the groups chosen cannot be cut together: {why}; choose other widths")
        _prune.compensate(model, chosen, ctx)
        ctx.cache.pop("channels", None)
        # Biases may have become tensors of their own: follow the model as it is now. Classes are numbered alike.
        ch.cut(_same_classes(channels, ch.analyse(model)), removed)
        surgery.remove_unused(model)


def _same_classes(before: ch.Channels, after: ch.Channels) -> ch.Channels:
    if len(before.classes) != len(after.classes) or not np.array_equal(before.classes, after.classes):
        raise TechniqueError("the model's channels must be numbered as before its weights were solved, but are not")
    return after


def _keep(action: Action, found: _prune.Ranked) -> int:
    """Units to keep, checked. Raises TechniqueError."""
    keep, n = int(action.get("keep", 0)), len(found.group.units)
    if not n - found.most <= keep <= n or keep < 1:
        raise TechniqueError(
            f"keep must be {max(n - found.most, 1)}..{n} for {found.group.name!r}, which has {n} units, but got {keep}"
        )
    return keep


TECHNIQUE: Technique = ChannelPrune()

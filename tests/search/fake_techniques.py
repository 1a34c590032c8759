"""Two small structure techniques: a plain SVD of Conv layers, and channels kept from the front of one chain."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Site, Stage
from featherweight.graph import surgery
from featherweight.graph.channels import KEPT
from featherweight.graph.weights import weights
from featherweight.techniques import Context, Estimate, Technique, all_techniques


class PlainSVD:
    """Conv (out, in, k, k) of one group -> Conv (rank, in, k, k), then Conv (out, rank, 1, 1)."""

    name: ClassVar[str] = "plain_svd"
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False
    factors: ClassVar[int] = 2

    def sites(self, model: ir.Model) -> Iterable[Site]:
        return [
            Site(w.name, "weight", (w.name,), (w.main_use.path,), w.size_bytes)
            for w in weights(model)
            if w.main_use.role == "conv" and w.groups == 1 and len(w.uses) == 1 and min(w.shape[:2]) >= 8
        ]

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        return [Action.of(self.name, rank=rank) for rank in (24, 16, 8, 4)]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        w = ctx.weight(model, site.name)
        rank, (out, inside, *kernel) = action.get("rank"), w.shape
        values = rank * inside * int(np.prod(kernel)) + out * rank
        s = np.linalg.svd(w.to_matrix(w.array())[0], compute_uv=False)
        return Estimate(4 * values, float((s[rank:] ** 2).sum() / (s**2).sum()), values / int(np.prod(w.shape)))

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        w = next(w for w in weights(model) if w.name == site.name)
        node, rank, (out, inside, *kernel) = w.main_use.node, action.get("rank"), w.shape
        u, s, vt = np.linalg.svd(w.array().reshape(out, -1), full_matrices=False)
        named = surgery.Namer(model)
        first = (np.sqrt(s[:rank])[:, None] * vt[:rank]).reshape(rank, inside, *kernel).astype(np.float32)
        second = (u[:, :rank] * np.sqrt(s[:rank])).reshape(out, rank, 1, 1).astype(np.float32)
        stored = [
            surgery.add_initializer(w.graph, named(f"{site.name}/{part}"), array)
            for part, array in (("first", first), ("second", second))
        ]
        attributes = {k: a for k, a in node.attributes.items() if k in ("pads", "strides", "dilations")}
        inner = surgery.make_node(named, "Conv", [node.inputs[0], stored[0]], f"{w.main_use.path}/first")
        inner.attributes.update({k: ir.Attr(k, a.type, a.value) for k, a in attributes.items()})
        surgery.insert_before(node, [inner])
        surgery.replace_input(node, 0, inner.outputs[0])
        surgery.replace_input(node, 1, stored[1])
        for name in ("pads", "strides", "dilations", "kernel_shape"):
            node.attributes.pop(name, None)
        surgery.remove_initializer(w.value)
        places = (inner.name or "", w.main_use.path)
        return tuple(
            Site(v.name or "", "weight", (v.name or "",), (place,), 4 * v.const_value.size)
            for v, place in zip(stored, places, strict=True)
        )

    def finish(self, model: ir.Model, ctx: Context) -> None:
        pass


class FrontChannels:
    """The channels between `stem` and `body` of the small network: the first `keep` of them stay."""

    name: ClassVar[str] = "front_channels"
    stage: ClassVar[Stage] = "structure"
    integer: ClassVar[bool] = False
    tensors = ("w1", "w2", "w3")

    def sites(self, model: ir.Model) -> Iterable[Site]:
        stored = {w.name: w for w in weights(model)}
        if not all(t in stored for t in self.tensors):
            return []
        size = sum(stored[t].size_bytes for t in self.tensors)
        return [Site("channels of stem", "channel_group", self.tensors, ("stem", "depthwise", "body"), size)]

    def options(self, model: ir.Model, site: Site, ctx: Context) -> Iterable[Action]:
        return [Action.of(self.name, keep=keep) for keep in (24, 16, 8)]

    def estimate(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> Estimate:
        share = action.get("keep") / ctx.weight(model, "w1").shape[0]
        return Estimate(round(site.size_bytes * share), 1 - share, share, (("w3", 1 - share),))

    def apply(self, model: ir.Model, site: Site, action: Action, ctx: Context) -> tuple[Site, ...]:
        keep = action.get("keep")
        for node in model.graph:
            narrow = {"stem": ((1, 0), (2, 0)), "depthwise": ((1, 0), (2, 0)), "body": ((1, 1),)}.get(
                node.name or "", ()
            )
            for index, axis in narrow:
                value = node.inputs[index]
                whole = value.const_value.numpy()
                surgery.set_initializer(value, np.take(whole, np.arange(keep), axis))
            if node.name == "depthwise":
                node.attributes["group"] = ir.AttrInt64("group", keep)
            if node.name in ("stem", "relu1", "depthwise", "relu2"):
                node.outputs[0].shape = None
                node.outputs[0].metadata_props[KEPT] = f"1:{','.join(map(str, range(keep)))}"
        return (site,)

    def finish(self, model: ir.Model, ctx: Context) -> None:
        pass


SVD: Technique = PlainSVD()
FRONT: Technique = FrontChannels()


@functools.cache
def with_fakes() -> dict[str, Technique]:
    """The installed techniques and these two."""
    return {SVD.name: SVD, FRONT.name: FRONT, **all_techniques()}

"""Small graphs that broke pruning tools: dead channels leave without a trace, any ratio runs, what must stay stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e2e.judging import Case, run, shared_cases
from featherweight.core import Action, Profile
from featherweight.graph import channels as ch
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.stats import collect
from featherweight.techniques import Context, get

PRUNE = get("channel_prune")
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


def cases(mode: str) -> list[Any]:
    found = [pytest.param(c, id=c.name) for c in shared_cases() if c.oracle.get("prune", {}).get("mode") == mode]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no folder of shared cases here"))]


def opened(case: Case) -> tuple[Any, Context]:
    model = normalise(io.load(case.model), run=None).model
    stats = collect(model, case.batches, seed=0)
    return model, Context(Profile("p", "x86_64", 1, 1 << 30, False), stats)


def cut(model: Any, keeps: dict[str, int], ctx: Context) -> Any:
    work = surgery.copy_model(model)
    sites = {s.name: s for s in PRUNE.sites(work)}
    for name, keep in keeps.items():
        PRUNE.apply(work, sites[name], Action.of("channel_prune", keep=keep), ctx)
    PRUNE.finish(work, ctx)
    return work


def stored_bytes(model: Any) -> int:
    return sum(v.const_value.nbytes for g in model.graphs() for v in g.initializers.values())


@pytest.mark.parametrize("case", cases("dead"))
def test_dead_channels_leave_without_a_trace(case: Case) -> None:
    model, ctx = opened(case)
    keeps = {}
    for site in PRUNE.sites(model):
        free = [a for a in PRUNE.options(model, site, ctx) if PRUNE.estimate(model, site, a, ctx).noise == 0]
        if free:
            keeps[site.name] = min(int(a.get("keep")) for a in free)
    assert keeps, "the dead channels must be seen"
    before = ch.analyse(model)
    lost = {g.name: len(g.units) - keeps.get(g.name, len(g.units)) for g in before.groups}
    work = cut(model, keeps, ctx)
    got = run(io.to_bytes(work), case.inputs)
    for name, expected in case.expected.items():
        np.testing.assert_allclose(got[name], expected, atol=2e-5, rtol=1e-5)
    assert stored_bytes(work) < stored_bytes(model)
    values = {v.name: v for n in work.graph for v in n.outputs}
    for dead in case.oracle["prune"]["dead"]:
        value = values.get(dead["tensor"])
        if value is not None:  # a norm folded into its layer takes the layer's output away
            found = ch.kept(value)
            assert found is not None, f"{dead['tensor']} kept all its channels"
            assert not set(dead["channels"]).intersection(found[1].tolist()), dead
    assert sum(lost.values()) > 0


@pytest.mark.parametrize("case", [*cases("valid"), *cases("dead")])
@pytest.mark.parametrize("ratio", RATIOS)
def test_any_ratio_gives_a_model_that_runs(case: Case, ratio: float) -> None:
    model, ctx = opened(case)
    keeps = {g.name: max(1, round((1 - ratio) * len(g.units))) for g in ch.analyse(model).groups}
    work = cut(model, keeps, ctx)
    got = run(io.to_bytes(work), case.inputs)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in case.expected.items()}
    assert all(np.isfinite(v).all() for v in got.values() if v.dtype.kind == "f")
    assert stored_bytes(work) <= stored_bytes(model)


@pytest.mark.parametrize("case", [*cases("valid"), *cases("dead")])
def test_a_higher_ratio_never_gives_a_larger_model(case: Case) -> None:
    model, ctx = opened(case)
    sizes = []
    for ratio in RATIOS:
        keeps = {g.name: max(1, round((1 - ratio) * len(g.units))) for g in ch.analyse(model).groups}
        sizes.append(stored_bytes(cut(model, keeps, ctx)))
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("case", cases("frozen"))
def test_what_must_stay_stays_and_says_why(case: Case) -> None:
    model, _ = opened(case)
    found = ch.analyse(model)
    assert not found.groups
    assert all("stay" in note.text for note in found.frozen)

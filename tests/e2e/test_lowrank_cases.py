"""Layers that factorise without loss are found, those that cannot pay are refused with a reason, padding survives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from e2e.judging import Case, run, shared_cases, worst_db
from featherweight.core import Action, Note, Profile, Site
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.stats import collect
from featherweight.techniques import Context, get

FACTORISE = ("low_rank", "conv_tucker", "conv_cp", "conv_spatial", "conv_depthwise_separable")
Offer = tuple[str, Site, Action]


def cases(wanted: str) -> list[Any]:
    """Cases whose right answer is an exact rank, or a gain of that kind."""
    found = []
    for case in shared_cases():
        answer = case.oracle.get("lowrank")
        if answer is not None and wanted == ("exact" if "exact_rank" in answer else answer.get("gain")):
            found.append(pytest.param(case, id=case.name))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason="no such shared case here"))]


def offers(model: Any, ctx: Context) -> list[Offer]:
    return [(n, s, a) for n in FACTORISE for s in get(n).sites(model) for a in get(n).options(model, s, ctx)]


def opened(case: Case) -> tuple[Any, Context]:
    model = normalise(io.load(case.model), run=None).model
    return model, Context(Profile("p", "x86_64", 1, 1 << 30, False), collect(model, case.batches, seed=0))


def factorised(model: Any, offer: Offer, ctx: Context) -> bytes:
    work = surgery.copy_model(model)
    get(offer[0]).apply(work, offer[1], offer[2], ctx)
    return io.to_bytes(work)


def check_runs(case: Case, model: Any, found: list[Offer], ctx: Context) -> None:
    """Each runs with shapes kept, is smaller or does less, and is off by about what it says."""
    for offer in found:
        estimate = get(offer[0]).estimate(model, offer[1], offer[2], ctx)
        saved = factorised(model, offer, ctx)
        got = run(saved, case.inputs)
        assert worst_db(case.expected, got) > (100 if estimate.noise < 1e-9 else 0), offer
        assert len(saved) < len(io.to_bytes(model)) or estimate.work < 1, offer


@pytest.mark.parametrize("case", cases("none"))
@pytest.mark.parametrize("seen", [True, False], ids=["statistics", "no data"])
def test_layers_without_gain_are_refused_with_that_reason(case: Case, seen: bool) -> None:
    model, ctx = opened(case)
    if not seen:
        ctx = Context(ctx.profile)
    assert offers(model, ctx) == []
    noted: dict[str, list[Note]] = {}
    for note in ctx.notes:
        noted.setdefault(note.where, []).append(note)
    for site in get("low_rank").sites(model):
        assert any("no gain" in note.text for note in noted[site.name]), site


@pytest.mark.parametrize("case", cases("check"))
def test_what_is_offered_runs_and_is_as_far_off_as_it_says(case: Case) -> None:
    model, ctx = opened(case)
    check_runs(case, model, offers(model, ctx), ctx)


@pytest.mark.parametrize("case", cases("exact"))
def test_exact_ranks_are_found_and_lose_nothing(case: Case) -> None:
    model, ctx = opened(case)
    found = offers(model, ctx)
    exact = [o for o in found if get(o[0]).estimate(model, o[1], o[2], ctx).noise < 1e-9]
    assert exact, "the rank is lower than the layer's size, which must be seen"
    rank = case.oracle["lowrank"]["exact_rank"]
    wanted = set(rank.values()) if isinstance(rank, dict) else {rank}
    assert wanted & {o[2].get("rank") for o in exact if o[0] == "low_rank"}
    for offer in exact:
        np.testing.assert_array_less(60, worst_db(case.expected, run(factorised(model, offer, ctx), case.inputs)))
    check_runs(case, model, found, ctx)

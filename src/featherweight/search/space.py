"""The decision space of the joint program: what may be decided at each weight and each group of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featherweight.core import Site
from featherweight.graph.weights import weights
from featherweight.search import joint
from featherweight.search.effects import SiteFacts
from featherweight.search.options import Structure, weight_options
from featherweight.search.prepare import Ground, site_facts
from featherweight.search.problem import Problem
from featherweight.search.solve import Choice


def decision_space(
    problem: Problem,
    ground: Ground,
    table: Mapping[str, Sequence[Choice]],
    structure: Structure,
    gains: Mapping[str, float],
) -> joint.Joint:
    """All decisions of the program: at each weight keep, numbers, factors and chains of both; at each group a width."""
    by_name = {w.name: w for w in weights(problem.model)}
    # Weights that no numeric technique offers anything for still shrink with their channels.
    plain = {
        w.name: Site(w.name, "weight", (w.name,), tuple(u.path for u in w.uses), w.size_bytes) for w in by_name.values()
    }
    shrinking = [t for name in structure.groups for t in structure.sites[name].tensors if t in plain]
    # What changes the whole model saves work at weights that nothing else is decided about.
    whole = [structure.sites[name] for name in structure.groups if structure.sites[name].kind == "model"]
    shrinking += [name for name, site in plain.items() if any(set(w.nodes).intersection(site.nodes) for w in whole)]
    sites = {**plain, **structure.sites, **ground.sites}
    facts = site_facts(problem, sites, by_name, gains)
    options = {
        name: weight_options(
            sites[name], facts[name], table.get(name, ()), structure.factors.get(name, ()), by_name.get(name)
        )
        for name in dict.fromkeys([*table, *structure.factors, *shrinking])
    }
    for name in structure.groups:
        held = sum(sites[t].size_bytes for t in sites[name].tensors if t in options)
        facts[name] = SiteFacts(0.0, max(sites[name].size_bytes - held, 0))
    return joint.Joint(sites, facts, options, structure.groups)

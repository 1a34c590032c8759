"""Bounds worked out by hand."""

from __future__ import annotations

from featherweight.core import Action, Budget, Decision, Effect, Site
from featherweight.search.bounds import SLACK_BYTES_PER_SITE, memory_bound, refusal, size_bound
from featherweight.search.solve import Choice


def two_sites() -> tuple[dict[str, list[Choice]], dict[str, Site]]:
    sites = {n: Site(n, "weight", (n,), (n + ".node",), b) for n, b in (("a", 8000), ("b", 4000))}
    table = {
        n: [
            Choice(Decision(n), Effect()),
            Choice(Decision(n, (Action.of("palette", bits=1),)), Effect(-s.size_bytes * 31 // 32)),
        ]
        for n, s in sites.items()
    }
    return table, sites


def test_size_bound_is_base_less_every_best_saving_less_slack():
    table, sites = two_sites()
    bound = size_bound(Budget(max_size_bytes=100), table, sites, base_bytes=20_000)
    # 20000 - 7750 - 3875 = 8375, less 2 x 256 of slack = 7863; but 8000 B are out of any technique's reach.
    assert SLACK_BYTES_PER_SITE == 256
    assert bound.reachable == 8000
    assert bound.proves_no
    assert "8000 B that no technique may touch" in bound.binding


def test_no_limit_proves_nothing():
    table, sites = two_sites()
    assert not size_bound(Budget(), table, sites, 20_000).proves_no
    assert refusal([size_bound(Budget(max_size_bytes=9000), table, sites, 20_000)]) is None


def test_memory_bound_counts_the_interface_alone_and_names_the_largest():
    bound = memory_bound(Budget(max_peak_bytes=600_000), {"x": ((1, 3, 224, 224), 4), "y": ((1, 1000), 4)})
    assert bound.reachable == 3 * 224 * 224 * 4 + 4000
    sentence = refusal([bound])
    assert sentence is not None
    assert "'x' of 602112 B" in sentence
    assert "no plan reaches 600000 B; the lower bound is 606112 B" in sentence

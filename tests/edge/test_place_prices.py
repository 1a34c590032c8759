"""Money of a month against figures worked by hand; price files from strangers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.edge import prices
from featherweight.errors import DataError

PROFILE = {"name": "p", "arch": "x86_64", "threads": 1, "memory_bytes": 10**9, "int8_dot": True}
INSTANCE = {"name": "mine", "kind": "instance", "per_hour": 0.5, "profile": PROFILE}


def table(**changes: Any) -> dict[str, Any]:
    return {"schema": 1, "kind": "prices", "currency": "USD", "offers": [copy.deepcopy(INSTANCE)], **changes}


def load(raw: Any, folder: Path) -> prices.PriceTable:
    path = folder / "prices.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return prices.load([path])


def offer(folder: Path, **fields: Any) -> prices.Offer:
    return load(table(offers=[{"name": "mine", "profile": PROFILE, **fields}]), folder).get("mine")


def test_an_instance_runs_all_month(tmp_path: Path) -> None:
    found = offer(tmp_path, kind="instance", per_hour=0.5, egress_per_gb=0.1, egress_free_gb=100)
    money = prices.month(found, requests=1e6, busy_ms=10, down_bytes=200_000, servers=2, per_kwh=9)
    assert money.compute == pytest.approx(2 * 0.5 * 730)
    assert money.egress == pytest.approx((200 - 100) * 0.1)
    assert money.total == pytest.approx(740.0)


def test_serverless_as_in_the_vendors_own_example(tmp_path: Path) -> None:
    # AWS: 512 MB, 3 million calls of 1 s, 400,000 GB-s and 1 million calls free: 18.34 + 0.40 dollars.
    found = offer(
        tmp_path, kind="serverless", memory_gb=0.5, per_gb_s=0.00001667, per_million_requests=0.2, free_gb_s=400_000,
        free_requests=1_000_000,
    )  # fmt: skip
    money = prices.month(found, requests=3e6, busy_ms=1000, down_bytes=0, servers=0, per_kwh=0)
    assert money.compute == pytest.approx(18.34, abs=0.005)
    assert money.requests == pytest.approx(0.40)


def test_without_the_free_shares_every_call_is_paid(tmp_path: Path) -> None:
    found = offer(
        tmp_path, kind="serverless", memory_gb=0.5, per_gb_s=0.00001667, per_million_requests=0.2, free_gb_s=400_000,
        free_requests=1_000_000,
    )  # fmt: skip
    found = prices.without_free(found)
    money = prices.month(found, requests=3e6, busy_ms=1000, down_bytes=0, servers=0, per_kwh=0)
    assert money.total == pytest.approx(1.5e6 * 0.00001667 + 0.6)


def test_serverless_rounds_each_call_up(tmp_path: Path) -> None:
    found = offer(tmp_path, kind="serverless", memory_gb=1, vcpus=2, per_vcpu_s=0.001, round_ms=100)
    money = prices.month(found, requests=1000, busy_ms=101, down_bytes=0, servers=0, per_kwh=0)
    assert money.compute == pytest.approx(1000 * 0.2 * 2 * 0.001)
    money = prices.month(found, requests=1000, busy_ms=100, down_bytes=0, servers=0, per_kwh=0)
    assert money.compute == pytest.approx(1000 * 0.1 * 2 * 0.001)


def test_a_cold_start_is_a_gap_longer_than_the_function_is_kept(tmp_path: Path) -> None:
    found = offer(tmp_path, kind="serverless", memory_gb=1, cold_ms=1000, keep_warm_s=600)
    assert prices.cold_share(found, 1 / 600) == pytest.approx(0.36788, abs=1e-5)
    assert prices.cold_share(found, 1.0) < 1e-200
    assert prices.cold_share(dataclasses.replace(found, kind="instance"), 1e-9) == 0.0


def test_owned_hardware_is_spread_over_its_life(tmp_path: Path) -> None:
    found = offer(
        tmp_path, kind="owned", price=4800, life_months=48, idle_w=100, busy_w=300, pue=1.5, upkeep=20, workers=4
    )
    # 2,628,000 s a month; 1,051,200 calls of 1 s on 2 servers of 4 workers: busy 5 % of the time.
    money = prices.month(found, requests=1_051_200, busy_ms=1000, down_bytes=0, servers=2, per_kwh=0.2)
    assert money.hardware == pytest.approx(200.0)
    assert money.power == pytest.approx(2 * (100 + 200 * 0.05) * 1.5 / 1000 * 730 * 0.2)
    assert money.upkeep == pytest.approx(40.0)


def test_every_shipped_figure_has_an_address_and_a_date_or_is_marked_assumed() -> None:
    shipped = prices.shipped()
    assert {o.kind for o in shipped.offers.values()} == set(prices.KINDS)
    assert len({name.split("-")[0] for name in shipped.offers} & {"aws", "azure", "google"}) == 3
    defaults = {f.name: f.default for f in dataclasses.fields(prices.Offer)}
    for found in shipped.offers.values():
        told = {f for s in found.sources for f in s.fields.split()}
        given = {n for n in (*prices.NUMBERS, "workers") if getattr(found, n) != defaults[n]}
        assert given <= told, (found.name, given - told)
        assert all(s.where.startswith(("https://", "assumed: ")) for s in (*found.sources, *found.profile.sources))
        assert {"rates", "memory_gb_per_s"} <= {f for s in found.profile.sources for f in s.fields.split()}
    assert shipped.sources[0].fields == "electricity_per_kwh"


def test_a_users_table_adds_and_replaces(tmp_path: Path) -> None:
    found = load(table(electricity_per_kwh=0.3), tmp_path)
    assert found.get("mine").per_hour == 0.5
    assert found.get("aws-cpu").per_hour == prices.shipped().get("aws-cpu").per_hour
    assert found.per_kwh == 0.3
    changed = load(table(offers=[{**INSTANCE, "name": "aws-cpu", "per_hour": 9.0}]), tmp_path)
    assert changed.get("aws-cpu").per_hour == 9.0
    assert changed.per_kwh == prices.shipped().per_kwh
    with pytest.raises(DataError, match="must be one of aws-cpu"):
        found.get("no such")


def test_currencies_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="EUR and USD"):
        load(table(currency="EUR"), tmp_path)


HOSTILE: list[tuple[Any, str]] = [
    ("{", "JSON"),
    ("[]", "object"),
    ("[" * 100_000, "JSON"),
    ('{"schema": 1, "kind": "prices", "currency": "USD", "offers": [{"per_hour": NaN}]}', "NaN"),
    (table(schema=2), "schema"),
    (table(kind="links"), "kind"),
    (table(offers={}), "list"),
    (table(offers=[7]), "object"),
    (table(surprise=1), "surprise"),
    (table(electricity_per_kwh=-1), "electricity_per_kwh"),
    (table(sources=[["x", "y", "yesterday"]]), "sources"),
    (table(offers=[INSTANCE, INSTANCE]), "twice"),
    (table(offers=[{**INSTANCE, "per_hour": -1}]), "per_hour"),
    (table(offers=[{**INSTANCE, "per_hour": "0.5"}]), "per_hour"),
    (table(offers=[{**INSTANCE, "per_hour": True}]), "per_hour"),
    (table(offers=[{**INSTANCE, "per_hour": 1e300}]), "per_hour"),
    (table(offers=[{**INSTANCE, "workers": 0}]), "workers"),
    (table(offers=[{**INSTANCE, "workers": 1.5}]), "workers"),
    (table(offers=[{**INSTANCE, "per_hours": 1}]), "per_hours"),
    (table(offers=[{**INSTANCE, "kind": "free"}]), "kind"),
    (table(offers=[{**INSTANCE, "profile": 3}]), "profile"),
    (table(offers=[{**INSTANCE, "profile": {**PROFILE, "memory_bytes": 0}}]), "memory_bytes"),
    (table(offers=[{"name": "x", "kind": "instance", "profile": PROFILE}]), "per_hour is needed"),
    (table(offers=[{"name": "x", "kind": "owned", "price": 1, "life_months": 0, "profile": PROFILE}]), "life_months"),
    (
        table(offers=[{"name": "x", "kind": "owned", "price": 1, "idle_w": 9, "busy_w": 3, "profile": PROFILE}]),
        "busy_w",
    ),
    (
        table(offers=[{"name": "x", "kind": "serverless", "memory_gb": 1, "round_ms": 0, "profile": PROFILE}]),
        "round_ms",
    ),
    (table(offers=[{"name": "x" * 600, "kind": "instance", "per_hour": 1, "profile": PROFILE}]), "name"),
]


@pytest.mark.parametrize(("raw", "law"), HOSTILE, ids=[law + str(i) for i, (_, law) in enumerate(HOSTILE)])
def test_a_hostile_table_is_refused_with_the_law(raw: Any, law: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=law):
        load(raw, tmp_path)


def test_a_file_that_is_too_large_or_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        prices.load([tmp_path / "absent.json"])
    (tmp_path / "big.json").write_text(" " * ((1 << 20) + 1))
    with pytest.raises(DataError, match="at most"):
        prices.load([tmp_path / "big.json"])

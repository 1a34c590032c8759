"""Options of a placement: latency and money worked by hand, rules, the three answers, the best split by brute force."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.core import Profile
from featherweight.edge import _splits, breakeven, mincut, place
from featherweight.edge.links import Link
from featherweight.edge.place import Load, Place, Question, Rules
from featherweight.edge.prices import SECONDS_A_MONTH, Offer
from featherweight.errors import BudgetError

WIDTH = 200
SERVER = Profile("server", "x86_64", 1, 10**9, True, rates={"float32": 50.0}, memory_gb_per_s=10.0)
DEVICE = Profile("dev", "arm64", 1, 10**9, True, rates={"float32": 5.0}, memory_gb_per_s=2.0, busy_w=2.0, idle_w=0.5)
# 8 Mbit/s are 1000 B/ms.
PUBLIC = Link("net", 8.0, 8.0, rtt_ms=20.0, rtt_p95_ms=40.0, outage=0.01)
INSIDE = dataclasses.replace(PUBLIC, name="lan", public=False)
INSTANCE = Offer("vm", "instance", "vm", SERVER, per_hour=0.5, egress_per_gb=0.1)
FUNCTION = Offer("fn", "serverless", "fn", SERVER, per_gb_s=0.001, memory_gb=1.0)
ONE_A_SECOND = Load(SECONDS_A_MONTH, peak=1.0)


def save_model(path: Path) -> Path:
    """x (1, 200) through three MatMuls of 200 x 200 with Relu between; a second input is added before the last."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), f"w{i}") for i in range(3)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "w1"], ["c"], "second"),
        helper.make_node("Add", ["c", "late"], ["d"], "join"),
        helper.make_node("MatMul", ["d", "w2"], ["y"], "third"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in ("x", "late")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, WIDTH])
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> list:
    path = save_model(tmp_path_factory.mktemp("place") / "m.onnx")
    return place.models({"original": path}, input_shapes={})


def ask(works: Any, *places: Place, rules: Rules | None = None, **fields: Any) -> Question:
    fields = {"load": ONE_A_SECOND, "measured_ms": {("device", ""): 100.0, ("s", ""): 10.0}, **fields}
    return Question(works, DEVICE, places, rules=rules or Rules(), **fields)


def row(found: place.Placement, kind: str) -> place.Row:
    return next(r for r in found.rows if r.kind == kind)


def test_latency_of_a_server_is_the_sum_of_its_parts(works: Any) -> None:
    found = row(place.place(ask(works, Place("s", INSTANCE, PUBLIC))), "server")
    # Two inputs of 800 B up, 800 B down at 1000 B/ms; 10 ms of service once a second wait 0.5 * 0.01 * 10 / 0.99 ms.
    waits = 0.5 * 0.01 * 10 / 0.99
    assert (found.up_bytes, found.down_bytes) == (1600, 800)
    assert found.up_ms == pytest.approx(1.6)
    assert found.mean_ms == pytest.approx(1.6 + 20 + waits + 10 + 0.8)
    assert found.p95_ms == pytest.approx(1.6 + 40 + 10 + 0.8)
    assert found.availability == pytest.approx(0.99)
    assert found.servers == 1
    assert found.utilisation == pytest.approx(0.01)


def test_money_of_a_server(works: Any) -> None:
    found = row(place.place(ask(works, Place("s", INSTANCE, PUBLIC))), "server")
    assert found.money.compute == pytest.approx(365.0)
    assert found.money.egress == pytest.approx(SECONDS_A_MONTH * 800 / 1e9 * 0.1)
    busy = ask(works, Place("s", INSTANCE, PUBLIC), load=Load(150 * SECONDS_A_MONTH, peak=2.0))
    found = row(place.place(busy), "server")
    assert found.servers == math.ceil(300 * 0.010 / 0.7)
    assert found.money.compute == pytest.approx(found.servers * 365.0)


def test_energy_of_the_device(works: Any) -> None:
    wireless = dataclasses.replace(PUBLIC, radio_w=1.0)
    found = place.place(ask(works, Place("s", FUNCTION, wireless)))
    assert row(found, "device").energy_j == pytest.approx(2.0 * 0.1)
    # Waiting 1.6 + 0.8 + 10 + 20 ms at 0.5 W, and the radio 2.4 ms at 1 W.
    assert row(found, "server").energy_j == pytest.approx(0.5 * 0.0324 + 0.0024)
    unknown = dataclasses.replace(DEVICE, busy_w=None)
    asked = dataclasses.replace(ask(works), device=unknown)
    assert row(place.place(asked), "device").energy_j is None


def test_devices_of_ones_own_are_money(works: Any) -> None:
    load = Load(SECONDS_A_MONTH, peak=1.0, devices=10, own_devices=True, device_life_months=20)
    asked = dataclasses.replace(ask(works, load=load, per_kwh=0.2), device=dataclasses.replace(DEVICE, price=300.0))
    money = row(place.place(asked), "device").money
    assert money.hardware == pytest.approx(10 * 300 / 20)
    used_kwh = SECONDS_A_MONTH * 0.2 / 3.6e6
    assert money.power == pytest.approx((10 * 0.5 / 1000 * 730 + used_kwh) * 0.2)


def test_the_best_split_is_the_best_of_every_cut(works: Any) -> None:
    where = Place("s", INSTANCE, PUBLIC)
    for wire in ("float", "int8"):
        asked = ask(works, where, wire=wire)
        graph = works[0].graph
        here = place.times_on(asked, works[0], "device", DEVICE)
        there = place.times_on(asked, works[0], "s", SERVER)
        costs = _splits.costs(graph, here, there, PUBLIC, wire=wire, raw_stays=False)
        every = [
            place._row(asked, works[0], where, mincut.wire_of(graph, head, costs.send), here, there)
            for head in graph.downsets()
        ]
        found = row(place.place(asked), "split")
        assert found.p95_ms == pytest.approx(min(r.p95_ms for r in every))


def test_a_split_sends_eight_bits_if_asked(works: Any) -> None:
    asked = ask(works, Place("s", INSTANCE, PUBLIC), wire="int8", rules=Rules(data_stays="device"),
                not_private=frozenset({"late"}))  # fmt: skip
    found = row(place.place(asked), "split")
    assert "late" in found.wire
    made = [n for n in found.wire if n != "late"]
    assert found.up_bytes == 800 + len(made) * (WIDTH + 8)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(), {"device", "server", "split"}),
        (Rules(data_stays="device"), {"device", "split"}),
        (Rules(data_stays="device", features_stay=True), {"device"}),
        (Rules(data_stays="site"), {"device", "split"}),
        (Rules(offline="internet"), {"device"}),
        (Rules(offline="any"), {"device"}),
    ],
)
def test_rules_on_a_public_link(works: Any, rules: Rules, kept: set[str]) -> None:
    found = place.place(ask(works, Place("s", INSTANCE, PUBLIC), rules=rules, not_private=frozenset({"late"})))
    assert {r.kind for r in found.rows if not r.breaks} == kept


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(data_stays="device"), {"device", "split"}),
        (Rules(data_stays="site"), {"device", "server", "split"}),
        (Rules(data_stays="site", features_stay=True), {"device", "server", "split"}),
        (Rules(offline="internet"), {"device", "server", "split"}),
        (Rules(offline="any"), {"device"}),
    ],
)
def test_rules_inside_the_site(works: Any, rules: Rules, kept: set[str]) -> None:
    found = place.place(ask(works, Place("s", INSTANCE, INSIDE), rules=rules, not_private=frozenset({"late"})))
    assert {r.kind for r in found.rows if not r.breaks} == kept


def test_an_input_that_enters_late_is_private_unless_said_otherwise(works: Any) -> None:
    found = place.place(ask(works, Place("s", INSTANCE, PUBLIC), rules=Rules(data_stays="device")))
    split = row(found, "split")
    assert not split.breaks
    assert "late" not in split.wire  # the cut moved behind it


def test_broken_rules_name_the_value(works: Any) -> None:
    rules = Rules(max_latency_ms=30.0, max_cost=100.0, data_stays="device", offline="any")
    found = row(place.place(ask(works, Place("s", INSTANCE, PUBLIC), rules=rules)), "server")
    told = "; ".join(found.breaks)
    for words in ("data stays on the device", "works without any network: needs net", "p95 52.4 ms", "a month: 365"):
        assert words in told


def test_yes_and_what_is_best(works: Any) -> None:
    places = (Place("s", INSTANCE, PUBLIC), Place("f", FUNCTION, PUBLIC))
    measured = {("device", ""): 100.0, ("s", ""): 10.0, ("f", ""): 10.0}
    rules = Rules(max_latency_ms=90.0)
    fast = place.place(ask(works, *places, rules=rules, measured_ms=measured, goal="latency"))
    cheap = place.place(ask(works, *places, rules=rules, measured_ms=measured, goal="cost"))
    assert fast.answer == cheap.answer == "yes"
    assert fast.best is not None
    assert cheap.best is not None
    assert cheap.best.place == "f"
    assert cheap.best.cost <= fast.best.cost
    assert fast.best.p95_ms == min(r.p95_ms for r in fast.rows if not r.breaks)


def test_no_is_proved_by_a_bound_over_all_cuts(works: Any) -> None:
    found = place.place(ask(works, Place("s", INSTANCE, PUBLIC), rules=Rules(max_latency_ms=30.0)))
    assert (found.answer, found.best) == ("no, proved", None)


def test_not_found_where_no_bound_rules_a_cut_out(works: Any) -> None:
    # A call's input must stay: the first MatMul runs on the device. Two thirds of the work on the server is quick
    # enough and too dear; less is cheaper and too slow. No bound speaks of both at once.
    rules = Rules(data_stays="device", max_latency_ms=95.0, max_cost=1.0)
    asked = ask(works, Place("s", FUNCTION, PUBLIC), rules=rules, not_private=frozenset({"late"}))
    found = place.place(asked)
    assert found.answer == "not found"


def test_what_does_not_fit_is_told(works: Any) -> None:
    small = dataclasses.replace(DEVICE, memory_bytes=1000, storage_bytes=500)
    asked = dataclasses.replace(ask(works, load=Load(20 * SECONDS_A_MONTH)), device=small)
    told = "; ".join(row(place.place(asked), "device").breaks)
    assert "of memory, has 1000 B" in told
    assert "of storage, has 500 B" in told
    assert "keeps up: busy 600%" in told


def test_a_link_that_is_often_down_has_no_p95(works: Any) -> None:
    flaky = dataclasses.replace(PUBLIC, outage=0.07)
    found = row(place.place(ask(works, Place("s", INSTANCE, flaky), rules=Rules(max_latency_ms=1e6))), "server")
    assert math.isinf(found.p95_ms)
    assert "down 7%" in found.breaks[0]


@pytest.mark.parametrize("wrong", [{"requests_a_month": 0}, {"peak": 0.5}, {"devices": 0}, {"most_utilisation": 1.0}])
def test_a_load_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=next(iter(wrong))):
        Load(**{"requests_a_month": 10.0, **wrong})


def test_break_even_of_an_hourly_and_a_metered_server(works: Any) -> None:
    hourly = dataclasses.replace(INSTANCE, workers=10_000, egress_per_gb=0.0)
    places = (Place("s", hourly, PUBLIC), Place("f", FUNCTION, PUBLIC))
    measured = {("device", ""): 100.0, ("s", ""): 10.0, ("f", ""): 10.0}
    asked = ask(works, *places, measured_ms=measured, splits=False)
    found = breakeven.break_evens(asked, place.place(asked))
    between = next(e for e in found if {e.below, e.above} == {"original: s", "original: f"})
    # 0.01 s * 1 GB * 0.001 a GB-s is 1e-5 a call; 365 a month buys 36.5 million.
    assert between.requests_a_month == pytest.approx(365 / 1e-5, rel=1e-6)
    assert (between.below, between.above) == ("original: f", "original: s")


def test_the_nearest_crossing_of_costs_that_climb_in_steps() -> None:
    def steps(x: float) -> float:
        return 100.0 * math.ceil(x / 1000)

    def line(x: float) -> float:
        return 0.15 * x

    # The line is above the steps from 666.7 on, below again in (1000, 1333.3), and so on.
    assert breakeven.crossing(steps, line, 600.0) == pytest.approx(666.67, rel=1e-3)
    assert breakeven.crossing(lambda _: 5.0, lambda _: 5.0, 10.0) is None
    assert breakeven.crossing(lambda x: x, lambda _: 1e99, 10.0) is None


def test_who_wins_where(works: Any) -> None:
    asked = ask(works, Place("s", FUNCTION, PUBLIC), goal="latency", splits=False)
    won = breakeven.winners(asked, size=5)
    assert (len(won.cells), len(won.cells[0])) == (5, 5)
    assert won.uplinks[2] == pytest.approx(8.0)
    assert won.loads[2] == pytest.approx(SECONDS_A_MONTH)
    # 40 + 10 ms and the bytes against 100 ms: the server, but on the slowest uplink, where 1600 B take 160 ms.
    middle = won.cells[2]
    assert won.options[middle[4]] == "original: s"
    assert won.options[middle[0]] == "original: device"

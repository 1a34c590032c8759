"""Transfer times and waiting, against figures worked by hand and known values of the formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from featherweight.edge import links, queueing
from featherweight.edge.links import Link, parse_link, push_ms
from featherweight.errors import DataError


def test_a_small_message_is_sent_at_the_links_rate() -> None:
    # 12,500 B = 100,000 bit at 10 Mbit/s; it fits the first window of 14,600 B.
    assert push_ms(12_500, 10.0, 50.0) == pytest.approx(10.0)


def test_a_large_message_starts_slowly() -> None:
    # 6.3 Mbit/s = 787.5 B/ms, 43,312.5 B in flight fill the link. Windows of 14,600 and 29,200 B wait a round trip
    # each, the third (58,400 B) fills the link: 2 * 55 ms + (602,112 - 43,800) / 787.5 ms.
    assert push_ms(602_112, 6.3, 55.0) == pytest.approx(110 + 558_312 / 787.5)


def test_loss_bounds_the_rate_as_mathis_says() -> None:
    # sqrt(1.5) * 1460 B / (100 ms * sqrt(0.01)) = 178.81 B/ms, whatever the link could do: of 100 segments one is lost.
    # 17,881 B in flight fill that, so one window of 14,600 B goes before.
    rate = math.sqrt(1.5) * 1460 / (100 * 0.1)
    assert push_ms(146_000, 1000.0, 100.0, 0.01) == pytest.approx(100 + (146_000 - 14_600) / rate)
    # A short transfer most likely loses nothing.
    assert push_ms(14_600, 1000.0, 100.0, 0.01) == pytest.approx(14_600 / 125_000)


def test_lost_segments_cost_a_round_trip() -> None:
    link = Link("l", 10, 10, rtt_ms=40, rtt_p95_ms=90, loss=0.01)
    share = 1 - 0.99**3  # two segments up, one down
    assert link.resend_ms(2_000, 100) == pytest.approx(share * 40)
    assert link.resend_ms(2_000, 100, p95=True) == 0.0  # 3 % of the calls, not one in twenty
    assert link.resend_ms(14_600, 100, p95=True) == 90.0


def test_the_radio_pays_for_the_time_it_sends() -> None:
    link = Link("l", 8.0, 16.0, 40, 40, radio_w=1.0, radio_w_per_mbit_up=0.5, radio_w_per_mbit_down=0.25)
    # 1 MB up takes 1 s at 1 + 0.5 * 8 W, 2 MB down 1 s at 1 + 0.25 * 16 W.
    assert link.radio_j(1e6, 2e6) == pytest.approx(5.0 + 5.0)
    assert Link("wire", 8, 8, 1, 1).radio_j(1e6, 1e6) == 0.0


def test_every_shipped_figure_of_a_link_has_a_source() -> None:
    shipped = links.presets()
    assert {"lan", "wifi", "4g", "5g", "adsl", "satellite"} <= set(shipped)
    for link in shipped.values():
        told = {f for s in link.sources for f in s.fields.split()}
        figures = {"up_mbit_s", "down_mbit_s", "rtt_ms", "rtt_p95_ms", "loss", "outage"}
        figures |= {f for f in ("radio_w", "radio_w_per_mbit_up", "radio_w_per_mbit_down") if getattr(link, f)}
        assert figures <= told, link.name
        assert all(s.where.startswith(("https://", "assumed: ")) for s in link.sources)


def test_links_as_people_write_them() -> None:
    assert parse_link("4g") is links.presets()["4g"]
    changed = parse_link("4g,rtt=80ms,outage=2%")
    assert (changed.rtt_ms, changed.rtt_p95_ms, changed.outage) == (80.0, 160.0, 0.02)
    assert changed.up_mbit_s == links.presets()["4g"].up_mbit_s
    own = parse_link("up=500kbit,down=0.02Gbit/s,rtt=1s,loss=0.01")
    assert (own.up_mbit_s, own.down_mbit_s, own.rtt_ms, own.loss) == (0.5, 20.0, 1000.0, 0.01)


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("6g", "must be one of"),
        ("", "lacks up"),
        ("up=1Mbit", "lacks down, rtt"),
        ("4g,up=0Mbit", "above 0"),
        ("4g,up=-3Mbit", "above 0"),
        ("4g,rtt=soon", "like 40ms"),
        ("4g,loss=200%", "from 0 to 1"),
        ("4g,loss=nan", "from 0 to 1"),
        ("4g,speed=3", "keys are"),
        ("4g,up=1..2Mbit", "above 0"),
    ],
)
def test_a_link_that_makes_no_sense_is_refused(text: str, law: str) -> None:
    with pytest.raises(DataError, match=law):
        parse_link(text)


def test_a_file_of_links(tmp_path: Path) -> None:
    good = {"name": "mine", "up_mbit_s": 2, "down_mbit_s": 3, "rtt_ms": 10, "public": False}
    path = tmp_path / "l.json"
    path.write_text(json.dumps({"schema": 1, "kind": "links", "links": [good]}))
    assert parse_link(str(path)).name == "mine"
    for bad in ({**good, "up_mbit_s": 0}, {**good, "rtt_p95_ms": 5}, {**good, "lose": 1}, {**good, "loss": True}):
        path.write_text(json.dumps({"schema": 1, "kind": "links", "links": [bad]}))
        with pytest.raises(DataError):
            parse_link(str(path))


def test_waiting_of_one_worker_is_exact() -> None:
    # M/D/1 at half load: rho / (2 (1 - rho)) * service = 0.5 * 10 ms.
    queue = queueing.waiting(1, 50.0, 10.0)
    assert queue.utilisation == pytest.approx(0.5)
    assert queue.mean_ms == pytest.approx(5.0)


def test_erlang_c_of_the_tables() -> None:
    assert queueing.erlang_c(1, 0.6) == pytest.approx(0.6)
    assert queueing.erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert queueing.erlang_c(5, 4.0) == pytest.approx(0.5541, abs=5e-5)
    assert queueing.erlang_c(3, 3.0) == 1.0
    assert queueing.erlang_c(1000, 900.0) < 0.01


def test_p95_of_waiting_and_overload() -> None:
    # W > t with probability C exp(-(c - a) t / s), taken at half: ln(0.5 / 0.05) * 10 ms / 0.5 / 2.
    assert queueing.waiting(1, 50.0, 10.0).p95_ms == pytest.approx(math.log(10) * 10 / 0.5 / 2)
    assert queueing.waiting(1, 100.0, 10.0).mean_ms == math.inf
    assert queueing.waiting(4, 0.0, 10.0).mean_ms == 0.0


def test_servers_needed() -> None:
    # 100 a second of 50 ms are 5 busy workers; at 70 % of 4 workers a server that is 5 / 2.8.
    assert queueing.servers_needed(100, 50, 4, 0.7) == 2
    assert queueing.servers_needed(0.001, 50, 4, 0.7) == 1
    assert queueing.servers_needed(56, 50, 4, 0.7) == 1  # exactly full

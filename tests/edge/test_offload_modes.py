"""Choosing a way with a clock of its own: margins, rest between changes, a link that drops and returns; the cache."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.edge.cache import Cache, key_of
from featherweight.edge.modes import Chooser, Track


def chooser(**options):
    return Chooser(("local", "split", "remote"), 1.0, **options)


def running(times, **options):
    """A chooser whose ways were measured as told, with the link up."""
    made = chooser(**options)
    for mode, seconds in times.items():
        if mode == "local":
            made.took(mode, seconds)
    made.probed({m: s for m, s in times.items() if m != "local"})
    return made


def test_local_until_the_server_was_reached():
    made = chooser()
    assert made.choose(0.0) == "local"
    made.probed({"split": 0.02, "remote": 0.1})
    assert made.choose(0.1) == "split"


def test_a_link_that_breaks_is_left_at_once_and_taken_again_after_good_probes_only():
    made = running({"local": 0.3, "split": 0.02})
    assert made.choose(0.0) == "split"
    made.failed("split", kind="connect", reason="cable")
    assert made.choose(0.001) == "local"
    assert made.reason == "cable"
    made.probed({"split": 0.02})
    assert made.choose(10.0) == "local"
    made.probed({"split": 0.02})
    assert made.choose(10.1) == "split"


def test_one_lost_answer_does_not_mean_the_link_is_down_two_do():
    made = running({"local": 0.3, "split": 0.02})
    made.choose(0.0)
    made.failed("split", kind="timeout", reason="late")
    assert made.choose(0.1) == "split"
    made.took("split", 0.02)
    made.failed("split", kind="timeout", reason="late")
    assert made.up
    made.failed("split", kind="lost", reason="gone")
    assert made.choose(0.2) == "local"


def test_a_busy_server_is_not_a_broken_link_but_too_busy_is_left():
    made = running({"local": 0.3, "split": 0.02})
    made.choose(0.0)
    for _ in range(3):
        made.failed("split", kind="busy", reason="503")
    assert made.up
    assert made.choose(0.1) == "split"
    for _ in range(20):
        made.failed("split", kind="busy", reason="503")
    assert made.choose(5.0) == "local"


@pytest.mark.parametrize("prefer", ["server", "fastest"])
def test_the_way_does_not_flutter_between_two_that_are_alike(prefer):
    made = running({"local": 0.9, "split": 0.100, "remote": 0.101}, prefer=prefer)
    made.choose(0.0)
    rng = np.random.default_rng(0)
    for step in range(200):
        for mode in ("split", "remote"):
            made.took(mode, 0.1 + 0.01 * rng.random())
        made.choose(10.0 * step)
    assert made.switches == 1


def test_a_way_that_is_clearly_better_is_taken_but_not_before_the_rest_is_over():
    made = running({"local": 0.9, "split": 0.1, "remote": 0.3})
    assert made.choose(0.0) == "split"
    for _ in range(30):
        made.took("remote", 0.02)
    assert made.choose(1.0) == "split"
    assert made.choose(2.5) == "remote"


def test_fastest_compares_with_the_local_model_and_server_does_not():
    times = {"local": 0.01, "split": 0.1}
    assert running(times, prefer="fastest").choose(5.0) == "local"
    assert running(times, prefer="server").choose(5.0) == "split"


def test_a_server_that_misses_the_deadline_is_left_and_taken_again_with_a_margin():
    made = running({"local": 0.01, "split": 0.1})
    made.choose(0.0)
    for _ in range(40):
        made.took("split", 1.2)
    assert made.choose(5.0) == "local"
    for _ in range(3):
        made.took("split", 0.95)
    assert made.choose(10.0) == "local"
    for _ in range(60):
        made.took("split", 0.3)
    assert made.choose(20.0) == "split"


def test_loss_counts_as_the_deadline():
    track = Track()
    assert track.expected_s(1.0) == float("inf")
    track.took(0.1)
    assert track.expected_s(1.0) == pytest.approx(0.1)
    track.lost()
    assert track.expected_s(1.0) == pytest.approx(0.9 * 0.1 + 0.1 * 1.0)


def test_what_was_measured_before_the_link_went_down_is_forgotten():
    made = running({"local": 0.3, "split": 0.02})
    made.down("cable")
    made.probed({"split": 0.5})
    assert made.tracks["split"].mean_s == 0.5


# The cache


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def feeds(value, kind=np.float32):
    return {"x": np.array([value], kind)}


def always(_):
    return True


def test_equal_inputs_are_answered_and_no_others():
    cache = Cache(8, 1000, 60.0, Clock())
    cache.put(key_of(feeds(1.0)), {"y": np.array([5.0])}, "split")
    found, source = cache.get(key_of(feeds(1.0)), always)
    assert (found["y"], source) == (5.0, "split")
    for other in (
        feeds(1.0, np.float64),
        feeds(np.nextafter(np.float32(1), 2)),
        {"z": feeds(1.0)["x"]},
        {"x": feeds(1.0)["x"][None]},
    ):
        assert cache.get(key_of(other), always) is None
    assert cache.get(key_of(feeds(0.0)), always) is None
    assert key_of(feeds(0.0)) != key_of(feeds(-0.0))
    assert key_of({"x": np.array(["a", "b"], object)}) != key_of({"x": np.array(["ab", ""], object)})


def test_answers_cannot_be_changed_from_outside():
    cache = Cache(8, 1000, 60.0, Clock())
    answer = {"y": np.array([5.0])}
    cache.put(key_of(feeds(1.0)), answer, "split")
    answer["y"][0] = 6
    cache.get(key_of(feeds(1.0)), always)[0]["y"][0] = 7
    assert cache.get(key_of(feeds(1.0)), always)[0]["y"] == 5.0


def test_entries_bytes_and_age_are_bounded():
    clock = Clock()
    cache = Cache(3, 1000, 60.0, clock)
    for value in range(3):
        cache.put(key_of(feeds(value)), {"y": np.zeros(1)}, "local")
    cache.get(key_of(feeds(0)), always)
    cache.put(key_of(feeds(3)), {"y": np.zeros(1)}, "local")
    assert [cache.get(key_of(feeds(v)), always) is None for v in range(4)] == [False, True, False, False]
    cache.put(key_of(feeds(9)), {"y": np.zeros(120)}, "local")
    assert cache._size <= 1000
    assert cache.get(key_of(feeds(9)), always) is not None
    cache.put(key_of(feeds(10)), {"y": np.zeros(1000)}, "local")
    assert cache.get(key_of(feeds(10)), always) is None
    clock.now = 61.0
    assert cache.get(key_of(feeds(9)), always) is None


def test_sources_that_are_not_accepted_are_no_answer():
    cache = Cache(3, 1000, 60.0, Clock())
    cache.put(key_of(feeds(1)), {"y": np.zeros(1)}, "local")
    assert cache.get(key_of(feeds(1)), lambda source: source != "local") is None
    assert cache.get(key_of(feeds(1)), always) is not None

"""Offload against real servers on loopback: right answers each way, links that break, hang, return, and lie."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("urllib3")

import serving
from misbehaving import Hanging
from serving import image

import featherweight as fw
from featherweight.edge.v2client import Connection, LinkError, read_url
from featherweight.errors import BudgetError, DataError, FeatherweightError, ModelError, RunError
from featherweight.runtime import ort

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths by name; 'small' is the local model, whose answers are twice those of the whole."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "head": serving.head(folder),
        "tail": serving.tail(folder),
        "whole": serving.whole(folder),
        "small": serving.whole(folder, "small", scale=2.0),
    }


@pytest.fixture(scope="module")
def expected(models):
    right = ort.session(models["whole"]).run({"image": image()})["logits"]
    return {"split": right, "remote": right, "local": 2 * right, "cache": right}


@pytest.fixture(scope="module")
def server(models):
    with serving.serving([models["tail"], models["whole"]]) as running:
        yield running


def offload(models, url, **options):
    chosen = {"tail": "tail", "fallback": models["small"], "probe_s": 0.02, "deadline": "5s", **options}
    head = models["head"] if chosen["tail"] else None
    return fw.Offload(head, url, **chosen)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("binary", [None, True, False])
@pytest.mark.parametrize("way", [{"tail": "tail"}, {"tail": None, "whole": "whole"}])
def test_the_server_answers_what_the_whole_model_answers(models, server, expected, way, binary):
    with offload(models, server.url, binary=binary, **way) as model:
        assert model.wait_until_up(10)
        reply = model.ask({"image": image()})
        assert reply.source == ("split" if way["tail"] else "remote")
        np.testing.assert_allclose(reply.outputs["logits"], expected["split"], rtol=1e-4, atol=1e-5)
        assert np.array_equal(model({"image": image()})["logits"], reply.outputs["logits"])
        assert model.stats().answered[reply.source] == 2


def test_the_url_may_name_the_model(models, server, expected):
    with offload(models, f"{server.url}/v2/models/whole", tail=None) as model:
        assert model.wait_until_up(10)
        assert model.ask({"image": image()}).source == "remote"


def test_packed_tensors_are_smaller_and_nearly_the_same(models, server, expected):
    sent = {}
    for encoding in ("float32", "zstd", "int8", "int8+zstd"):
        with offload(models, server.url, wire=encoding) as model:
            assert model.wait_until_up(10)
            outputs = model({"image": image()})
            sent[encoding] = model.stats().sent_bytes
            assert model.stats().wire == encoding
        bound = 1e-4 if encoding in ("float32", "zstd") else 0.1
        np.testing.assert_allclose(outputs["logits"], expected["split"], atol=bound, rtol=1e-4)
    assert sent["zstd"] < sent["float32"]
    assert sent["int8+zstd"] < sent["int8"] < sent["float32"] / 2


def test_a_server_that_is_away_is_no_error(models, expected):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with offload(models, url) as model:
        reply = model.ask({"image": image()})
        assert reply.source == "local"
        np.testing.assert_allclose(reply.outputs["logits"], expected["local"], rtol=1e-5)
        assert until(lambda: "cannot connect" in model.stats().reason)
        assert not model.wait_until_up(0.01)


def test_the_link_drops_and_returns_and_nothing_is_lost(models, expected):
    with serving.serving([models["tail"]]) as first:
        model = offload(models, first.url)
        model._chooser.dwell_s = 0.0
        assert model.wait_until_up(10)
        sources = []

        def ask(count):
            for _ in range(count):
                reply = model.ask({"image": image()})
                np.testing.assert_allclose(reply.outputs["logits"], expected[reply.source], rtol=1e-4, atol=1e-5)
                sources.append(reply.source)

        ask(5)
        first.stop()
        ask(5)
        assert sources == ["split"] * 5 + ["local"] * 5
        with serving.serving([models["tail"]], port=first.port):
            assert until(lambda: model.stats().up)
            ask(3)
            assert sources[-3:] == ["split"] * 3
            model.close()
    assert sum(model.stats().answered.values()) == 13


@pytest.fixture
def hanging(models):
    made = []

    def make(behaviour):
        made.append(Hanging(models, behaviour))
        return made[-1]

    yield make
    for server in made:
        server.close()


def test_a_server_that_hangs_is_answered_for_and_asked_once(models, expected, hanging):
    server = hanging("hang")
    with offload(models, server.url, tail=None, whole="m", deadline="300ms") as model:
        assert model.wait_until_up(10)
        replies = [model.ask({"image": image()}) for _ in range(3)]
        assert [r.source for r in replies] == ["local"] * 3
        for reply in replies:
            np.testing.assert_allclose(reply.outputs["logits"], expected["local"], rtol=1e-5)
        assert until(lambda: model.stats().lost >= len(server.requests))
        assert 1 <= len(server.requests) <= model.stats().hedged <= 3


def test_an_answer_that_comes_after_the_local_one_is_counted_and_not_used(models, expected, hanging):
    server = hanging("late")
    with offload(models, server.url, tail=None, whole="m", deadline="5s", prefer="fastest") as model:
        assert model.wait_until_up(10)
        model._chooser.tracks["local"].mean_s = 60.0  # as if it were slow, so that the server is the fastest
        reply = model.ask({"image": image()})  # the local model stands in as soon as the answer is later than usual
        assert reply.source == "local"
        server.release.set()
        assert until(lambda: model.stats().late == 1)
        assert model.stats().lost == 0


def test_a_link_that_goes_silent_is_found_out_before_the_deadline(models, hanging):
    server = hanging("freeze")
    server.behaviour = "late"
    with offload(models, server.url, tail=None, whole="m", deadline="9s") as model:
        assert model.wait_until_up(10)
        server.behaviour = "freeze"
        reply = model.ask({"image": image()})
        assert reply.source == "local"
        assert not model.stats().up
        assert model.stats().lost == 0  # the request itself has not failed yet: its deadline is far
        assert model.ask({"image": image()}).source == "local"
        assert len(server.requests) == 1
        server.release.set()


def test_requests_in_the_air_stop_waiting_when_the_link_is_known_to_be_down(models, hanging):
    server = hanging("hang")
    with offload(models, server.url, tail=None, whole="m", deadline="8s", in_flight=4) as model:
        assert model.wait_until_up(10)
        model._chooser.tracks["remote"].mean_s = 3.0  # as if such answers were usual
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(model.ask, {"image": image()}) for _ in range(3)]
            assert until(lambda: len(server.requests) == 3)
            server.behaviour = "reset"
            broken = model.ask({"image": image()})
            server.behaviour = "late"
            model._failed("remote", LinkError("connect", "cable"))
            assert {w.result(5).source for w in waiting} == {"local"}
        assert broken.source == "local"
        server.release.set()


@pytest.mark.parametrize(
    "behaviour",
    [
        "reset", b"", b"not json", b"[]", b'{"outputs": []}', b'{"outputs": 5}',
        b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 5], "data": [1]}]}',
        b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1], "data": [1]}]}',
        b'{"id": "other", "outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 5], "data": [1, 2, 3, 4, 5]}'
        b"]}",
        b'{"outputs": [{"name": "other", "datatype": "FP32", "shape": [1], "data": [1]}]}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_answers_that_are_none_are_replaced_by_the_local_ones(models, expected, hanging, behaviour):
    server = hanging(behaviour)
    with offload(models, server.url, tail=None, whole="m") as model:
        assert model.wait_until_up(10)
        reply = model.ask({"image": image()})
        assert reply.source == "local"
        np.testing.assert_allclose(reply.outputs["logits"], expected["local"], rtol=1e-5)
        assert len(server.requests) == 1


def test_a_server_of_another_model_is_not_used(models, tmp_path):
    other = serving.save(
        tmp_path / "other.onnx", [serving.helper.make_node("Flatten", ["hidden"], ["logits"])],
        [("hidden", serving.FLOAT, ["n", 5])], [("logits", serving.FLOAT, ["n", 5])],
    )  # fmt: skip
    with serving.serving([other]) as running, offload(models, running.url, tail="other") as model:
        assert until(lambda: "serve the tail that belongs to this head" in model.stats().reason)
        assert model.ask({"image": image()}).source == "local"
    with serving.serving([models["tail"]]) as running, offload(models, running.url, tail="absent") as model:
        assert until(lambda: "404" in model.stats().reason)
        assert model.ask({"image": image()}).source == "local"


def test_a_way_that_is_missing_does_not_close_the_other(models, server):
    with offload(models, server.url, tail="tail", whole="absent") as model:
        assert model.wait_until_up(10)
        assert model.ask({"image": image()}).source == "split"


def test_wrong_inputs_are_the_callers_error_and_never_travel(models, server):
    with offload(models, server.url) as model:
        assert model.wait_until_up(10)
        for wrong in ({}, {"other": image()}, {"image": image().astype(np.float64)}, {"image": image()[0]}):
            with pytest.raises(DataError):
                model.ask(wrong)
        assert model.stats().up
        assert model.stats().sent_bytes == 0


def test_repeated_inputs_are_answered_from_the_cache(models, server, expected):
    with offload(models, server.url, cache=10) as model:
        assert model.wait_until_up(10)
        assert [model.ask({"image": image()}).source for _ in range(3)] == ["split", "cache", "cache"]
        assert model.ask({"image": image(seed=1)}).source == "split"


def test_many_threads_get_their_own_answers(models, server):
    whole, small = ort.session(models["whole"]), ort.session(models["small"])
    images = [image(seed=s) for s in range(40)]
    with offload(models, server.url, in_flight=4) as model:
        assert model.wait_until_up(10)
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda x: model.ask({"image": x}), images))
        stats = model.stats()
    for x, reply in zip(images, replies, strict=True):
        right = small if reply.source == "local" else whole
        np.testing.assert_allclose(reply.outputs["logits"], right.run({"image": x})["logits"], rtol=1e-4, atol=1e-4)
    assert sum(stats.answered.values()) == 40


def test_if_the_local_model_fails_the_answer_of_the_server_is_waited_for(models, server, expected):
    broken = ort.session(models["small"])
    with offload(models, server.url, fallback=broken) as model:
        assert model.wait_until_up(10)

        def fail(*_, **__):
            raise RunError("broken")

        setattr(broken, "run", fail)  # noqa: B010
        model._chooser.tracks["split"].mean_s, model._chooser.tracks["split"].deviation_s = 1e-6, 0.0
        np.testing.assert_allclose(model({"image": image()})["logits"], expected["split"], rtol=1e-4, atol=1e-5)
        server_gone = LinkError("connect", "gone")
        model._failed("split", server_gone)
        with pytest.raises(RunError, match="broken"):
            model({"image": image()})


def test_the_token_is_sent_and_guarded(models, tmp_path):
    with pytest.raises(FeatherweightError, match="unencrypted"):
        offload(models, "http://192.0.2.1:8000", token=TOKEN)
    file = tmp_path / "token"
    file.write_text(TOKEN)
    with serving.serving([models["tail"]], token=TOKEN) as running:
        with offload(models, running.url, token=file) as model:
            assert model.wait_until_up(10)
        with offload(models, running.url, token="another-token-altogether") as model:
            assert until(lambda: "401" in model.stats().reason)
            assert TOKEN not in model.stats().reason


def test_closing_is_clean(models, server):
    before = threading.active_count()
    model = offload(models, server.url)
    assert model.wait_until_up(10)
    model.ask({"image": image()})
    model.close()
    model.close()
    assert threading.active_count() == before
    with pytest.raises(FeatherweightError, match="closed"):
        model.ask({"image": image()})


@pytest.mark.parametrize(
    "url", ["ftp://host", "host:8000", "https://", "https://user:secret@host", "https://host?token=secret", ""]
)
def test_urls_that_name_no_server(models, url):
    with pytest.raises(FeatherweightError) as caught:
        offload(models, url)
    assert "secret" not in str(caught.value)


def test_urls():
    assert read_url("https://host:1/") == ("https://host:1", None)
    assert read_url("https://host/base/v2") == ("https://host/base", None)
    assert read_url("http://host/base/v2/models/m/versions/1/infer") == ("http://host/base", "m")


def test_what_cannot_be_used_is_said_at_once(models):
    for options, error in (
        ({"deadline": "5%"}, BudgetError),
        ({"prefer": "cheapest"}, BudgetError),
        ({"wire": "int4"}, DataError),
        ({"tail": None}, ModelError),
        ({"fallback": models["tail"]}, ModelError),
    ):
        with pytest.raises(error):
            offload(models, "http://127.0.0.1:9", **options)


def test_connections_end_with_the_deadline(models, hanging):
    server = hanging("hang")
    connection = Connection(server.url)
    with pytest.raises(LinkError) as caught:
        connection.infer("m", {"image": image()}, outputs=["logits"], timeout_s=0.1, binary=False)
    assert caught.value.kind == "timeout"
    assert len(server.requests) == 1
    connection.close()

"""The server as a client sees it: metadata, inference in both forms, batching, the bounded queue, metrics, the end."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import serving
from onnx import helper
from serving import BOOL, FLOAT, INT64, STRING, image, save, tensor, weights

from featherweight.edge import http as blocks
from featherweight.edge import protocol, wire
from featherweight.edge.http import RequestError
from featherweight.edge.serve import batching, metrics
from featherweight.edge.serve.models import load, load_all, split_name
from featherweight.errors import ModelError
from featherweight.runtime import ort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(folder):
    with serving.serving([serving.whole(folder), kinds(folder), strings(folder)]) as running:
        yield running


@pytest.fixture(scope="module")
def plain(folder):
    return ort.session(serving.whole(folder, "plain"))


def kinds(folder):
    """Two inputs of other types, no batch axis: y = x + 1 for whole numbers, z = not b."""
    nodes = [helper.make_node("Add", ["x", "one"], ["y"]), helper.make_node("Not", ["b"], ["z"])]
    return save(
        folder / "kinds.onnx", nodes, [("x", INT64, [2]), ("b", BOOL, [])], [("y", INT64, [2]), ("z", BOOL, [])],
        {"one": np.array(1, np.int64)},
    )  # fmt: skip


def strings(folder):
    nodes = [helper.make_node("Identity", ["s"], ["t"])]
    return save(folder / "strings.onnx", nodes, [("s", STRING, ["n"])], [("t", STRING, ["n"])])


def test_health_and_metadata(server):
    assert server.ask("GET", "/v2/health/live")[0] == 200
    assert server.ask("GET", "/v2/health/ready")[0] == 200
    about = json.loads(server.ask("GET", "/v2")[2])
    assert about["extensions"] == ["binary_tensor_data", wire.EXTENSION]
    for path in ("/v2/models/whole", "/v2/models/whole/versions/1"):
        found = json.loads(server.ask("GET", path)[2])
        assert found["name"] == "whole"
        assert found["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
        assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]
        assert json.loads(server.ask("GET", f"{path}/ready")[2]) == {"name": "whole", "ready": True}


def test_json_gives_what_the_runtime_gives(server, plain):
    status, answer = server.infer("whole", {"id": "a-7", "inputs": [tensor("image", image(2))]})
    assert status == 200
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a-7", "whole", "1")
    (out,) = answer["outputs"]
    assert out["shape"] == [2, 5]
    expected = plain.run({"image": image(2)})["logits"]
    np.testing.assert_allclose(np.reshape(out["data"], (2, 5)), expected, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_binary_gives_the_same_bytes_as_the_runtime(server, plain, encoding):
    header = {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    body, length = protocol.write_message(header, "inputs", [protocol.pack("image", image(3))])
    sent = gzip.compress(body) if encoding == "gzip" else body
    status, headers, answer = server.ask(
        "POST", "/v2/models/whole/versions/1/infer", sent,
        {protocol.LENGTH_HEADER: str(length), "Content-Encoding": encoding, "X-Request-Id": "r1"},
    )  # fmt: skip
    assert status == 200
    assert headers["X-Request-Id"] == "r1"
    parsed, raw = protocol.split_body(answer, headers[protocol.LENGTH_HEADER])
    found = protocol.unpack(protocol.read_message(parsed, raw, "outputs").tensors[0])
    np.testing.assert_allclose(found, plain.run({"image": image(3)})["logits"], rtol=1e-5)


def test_every_output_in_binary_at_once(server):
    request = {"parameters": {"binary_data_output": True}, "inputs": [tensor("image", image())]}
    status, headers, _ = server.ask("POST", "/v2/models/whole/infer", json.dumps(request).encode())
    assert status == 200
    assert protocol.LENGTH_HEADER in headers


def test_packed_tensors_are_unpacked(server, plain):
    value = image(4)
    packet = wire.encode(value, "int8+zstd")
    packed = protocol.Packed("image", "FP32", value.shape, packet, {wire.EXTENSION: "int8+zstd"})
    body, length = protocol.write_message({}, "inputs", [packed])
    status, _, answer = server.ask("POST", "/v2/models/whole/infer", body, {protocol.LENGTH_HEADER: str(length)})
    assert status == 200
    expected = plain.run({"image": wire.decode(packet, value.shape)})["logits"]
    np.testing.assert_allclose(json.loads(answer)["outputs"][0]["data"], expected.ravel(), rtol=1e-4, atol=1e-4)


def test_models_without_a_batch_axis_run_alone(server):
    inputs = [
        {"name": "x", "datatype": "INT64", "shape": [2], "data": [1, -5]},
        {"name": "b", "datatype": "BOOL", "shape": [], "data": True},
    ]
    status, answer = server.infer("kinds", {"inputs": inputs, "outputs": [{"name": "z"}, {"name": "y"}]})
    assert status == 200
    assert [(o["name"], o["datatype"], o["data"]) for o in answer["outputs"]] == [
        ("z", "BOOL", [False]),
        ("y", "INT64", [2, -4]),
    ]


def test_texts_go_both_ways(server):
    given = {"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "ü"]}
    status, answer = server.infer("strings", {"inputs": [given]})
    assert status == 200
    assert answer["outputs"][0]["data"] == ["a", "ü"]


def test_description_names_every_route(server):
    described = json.loads(server.ask("GET", "/openapi.json")[2])["paths"]
    routes = {r.resource.canonical for r in server.app.router.routes()}
    assert set(described) == routes - {"/v2/"}


def test_metrics_count_what_was_answered(folder):
    with serving.serving([serving.whole(folder)]) as running:
        for _ in range(3):
            running.infer("whole", {"inputs": [tensor("image", image())]})
        running.infer("whole", {})
        running.ask("GET", "/v2/models/" + "x" * 50)
        _, headers, body = running.ask("GET", "/metrics")
    lines = body.decode().splitlines()
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'featherweight_requests_total{model="whole",status="200"} 3' in lines
    assert 'featherweight_requests_total{model="whole",status="400"} 1' in lines
    assert 'featherweight_requests_total{model="",status="404"} 1' in lines
    assert 'featherweight_request_seconds_count{model="whole"} 3' in lines
    assert 'featherweight_queue_length{model="whole"} 0' in lines


def test_metrics_are_text_that_prometheus_reads():
    counter = metrics.Counter("c", "A count.")
    counter.add(2, label='a"b\\c\nd')
    spread = metrics.Histogram("h", "A spread.", (0.5, 1))
    for value in (0.5, 0.7, 3):
        spread.add(value)
    assert metrics.page([counter, spread]).splitlines() == [
        "# HELP c A count.", "# TYPE c counter", 'c{label="a\\"b\\\\c\\nd"} 2', "# HELP h A spread.",
        "# TYPE h histogram",
        'h_bucket{le="0.5"} 1', 'h_bucket{le="1"} 2', 'h_bucket{le="+Inf"} 3', "h_sum 4.2", "h_count 3",
    ]  # fmt: skip


# Batching


def test_batching_is_found_by_names_and_by_trying(tmp_path):
    assert load("whole", serving.whole(tmp_path), threads=1).batched
    assert not load("whole", serving.whole(tmp_path), threads=1, batching=False).batched
    fixed = load("kinds", kinds(tmp_path), threads=1)
    assert not fixed.batched
    assert "fixed" in fixed.why or "single value" in fixed.why


def test_an_axis_that_mixes_its_rows_is_no_batch_axis(tmp_path):
    """Names say batch, but each row's answer depends on the others: a mean over all rows."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])]
    mixing = save(tmp_path / "mixing.onnx", nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 4])])
    found = load("mixing", mixing, threads=1)
    assert not found.batched
    assert "depends on the other rows" in found.why


def test_inputs_with_different_first_axes_are_not_joined(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [("x", FLOAT, ["n", 4]), ("w", FLOAT, ["k", 3])], [("y", FLOAT, ["n", 3])])
    assert not load("m", path, threads=1).batched


class Held:
    """A model's runs, counted, each held until it is let go."""

    def __init__(self, path):
        self.model = load("m", path, threads=1)
        self.go = threading.Event()
        self.batches = []

    def batcher(self, pool, **options):
        chosen = {"workers": 1, "max_batch": 8, "max_delay_s": 0.0, "queue": 100, **options}
        return batching.Batcher(self.model, pool, on_batch=lambda ran: self.batches.append(ran.requests), **chosen)


def rowwise(folder):
    """y = x w with any number of columns cut off by Reshape-free arithmetic: y (n, k) = 2 x."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["y"])]
    return save(
        folder / "rows.onnx", nodes, [("x", FLOAT, ["n", "k"])], [("y", FLOAT, ["n", "k"])], {"two": np.float32([2])}
    )


def run_jobs(batcher, pool, go, feeds):
    """Outputs (or errors) of all requests, which wait together behind a first run that is held."""

    async def main():
        pool.submit(go.wait, 10)
        asked = [asyncio.ensure_future(batcher.run(f, ("y",), len(f["x"]), lambda: False)) for f in feeds]
        await asyncio.sleep(0.02)
        go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(main())


def test_what_waits_together_runs_together_and_shapes_are_kept_apart(tmp_path):
    held = Held(rowwise(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        batcher = held.batcher(pool)
        feeds = [{"x": weights(1 + i % 2, 3 + i % 3, seed=i)} for i in range(12)]
        answers = run_jobs(batcher, pool, held.go, feeds)
    for feed, (outputs, _) in zip(feeds, answers, strict=True):
        assert np.array_equal(outputs["y"], 2 * feed["x"])
    assert sum(held.batches) == 12
    assert len(held.batches) <= 5  # the first alone, then one or two for each of three widths
    assert batcher.waiting == 0


def test_a_batch_has_at_most_max_rows(tmp_path):
    held = Held(rowwise(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        answers = run_jobs(held.batcher(pool, max_batch=4), pool, held.go, [{"x": weights(1, 2)}] * 9)
    assert all(isinstance(a, tuple) for a in answers)
    assert max(held.batches) <= 4


def test_a_request_beyond_the_queue_is_told_to_come_again(tmp_path):
    held = Held(rowwise(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        answers = run_jobs(held.batcher(pool, queue=3), pool, held.go, [{"x": weights(1, 2)}] * 6)
    refused = [a for a in answers if isinstance(a, RequestError)]
    assert len(refused) == 2  # one runs, three wait
    assert all(r.status == 503 and r.headers["Retry-After"] for r in refused)


def test_nobody_waits_for_company_longer_than_the_bound_and_those_who_left_do_not_run(tmp_path):
    held = Held(rowwise(tmp_path))

    async def main(pool):
        batcher = held.batcher(pool, max_delay_s=0.05)
        batcher._usual = 8.0  # as after a time of many requests at once
        answer, job = await batcher.run({"x": weights(1, 2)}, ("y",), 1, lambda: False)
        assert job.waited_s >= 0.03
        gone = asyncio.ensure_future(batcher.run({"x": weights(1, 2)}, ("y",), 1, lambda: True))
        with pytest.raises(asyncio.CancelledError):
            await gone
        return answer

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(main(pool))
    assert held.batches == [1]


def test_one_bad_request_does_not_fail_its_neighbours(tmp_path):
    """Gather fails on an index that is out of range; its batch is run again one by one."""
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    path = save(tmp_path / "g.onnx", nodes, [("x", INT64, ["n", 2])], [("y", FLOAT, ["n", 2])], {"table": weights(5)})
    held = Held(path)
    feeds = [{"x": np.array([[i, 1]])} for i in (0, 1, 99, 2)]
    with ThreadPoolExecutor(1) as pool:
        answers = run_jobs(held.batcher(pool), pool, held.go, feeds)
    assert [isinstance(a, RequestError) for a in answers] == [False, False, True, False]
    assert answers[2].status == 400
    assert np.array_equal(answers[3][0]["y"], weights(5)[[[2, 1]]])


def test_a_request_in_progress_is_finished_when_the_server_ends(folder):
    with serving.serving([serving.whole(folder)]) as running:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(running.infer("whole", {"inputs": [tensor("image", image(400))]}))
        )
        asking.start()
        while not blocks.state(running.app).held_bytes and asking.is_alive():
            pass  # until its body is there
        running.stop()
        asking.join(10)
    assert answers
    assert answers[0][0] == 200


# Names


def test_names_of_models(tmp_path):
    assert split_name("/a/b/my model.onnx")[0] == "my_model"
    assert split_name("x=/a/b.onnx") == ("x", split_name("/a/b.onnx")[1])
    assert split_name("/a=b/c.onnx")[0] == "c"
    for bad in ("..=m.onnx", "a b=m.onnx", "=m.onnx", "x" * 200 + "=m.onnx"):
        with pytest.raises(ModelError):
            split_name(bad)
    with pytest.raises(ModelError, match="name of its own"):
        load_all(["a/m.onnx", "b/m.onnx"], threads=1, batching=True, max_axis=10)

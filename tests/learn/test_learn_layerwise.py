"""Block by block: the files of what blocks read, and the parts of a micro-batch that make a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from featherweight.graph import io  # noqa: E402
from featherweight.learn import layerwise, losses  # noqa: E402
from featherweight.learn.blocks import Block, Pair  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.learn.layerwise import WHOLE, Files  # noqa: E402
from featherweight.learn.training import Recipe  # noqa: E402


def block(path: Path, *, mean_of_batch: bool = False, coded: bool = False, four_at_a_time: bool = False) -> Executor:
    """x (n, 3, 32, 32) -> convolution -> h; on request less its mean over the batch, with its weight as int8, or by way
    of clips of four pictures.
    """
    weight = np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c" if mean_of_batch else "h"])]
    stored = [numpy_helper.from_array(weight, "w")]
    if coded:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["w"]))
        codes = np.clip(np.round(weight * 50), -127, 127).astype(np.int8)
        stored = [numpy_helper.from_array(codes, "q"), numpy_helper.from_array(np.float32(0.02), "s")]
    if mean_of_batch:
        stored.append(numpy_helper.from_array(np.array([0]), "axes"))
        nodes += [helper.make_node("ReduceMean", ["c", "axes"], ["m"]), helper.make_node("Sub", ["c", "m"], ["h"])]
    if four_at_a_time:
        for name, shape in (("clips", [-1, 4, 4, 32, 32]), ("pictures", [-1, 4, 32, 32])):
            stored.append(numpy_helper.from_array(np.array(shape), name))
        nodes[-1].output[0] = "c"
        nodes += [
            helper.make_node("Reshape", ["c", "clips"], ["v"]),
            helper.make_node("Reshape", ["v", "pictures"], ["h"]),
        ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 4, 32, 32])], stored,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return Executor(io.load(path))


def filled(folder: Path, sizes: tuple[int, ...] = (16, 16, 5, 16), *, stackable: bool = True) -> Files:
    """Micro-batches of so many pictures; the last is for checking."""
    files, rng = Files(folder), np.random.default_rng(1)
    folder.mkdir()
    for i, n in enumerate(sizes):
        files.put("feeds", i, {"x": torch.from_numpy(rng.normal(size=(n, 3, 32, 32)).astype(np.float32))})
        files.put("theirs", i, {"t": torch.from_numpy(rng.normal(size=(n, 4, 32, 32)).astype(np.float32))})
    files.n, files.checked, files.stackable = len(sizes), len(sizes) - 1, stackable
    return files


def taught(executor: Executor, files: Files) -> layerwise._Taught:
    only = Block(("x",), Pair("t", "h"), ("w",))
    job = layerwise.Blockwise(executor, [only], [1], Recipe, {}, ["y"], lambda *_: torch.zeros(()))
    return layerwise._Taught(job, only, files, 0)


def test_a_step_of_a_large_map_is_a_few_samples(tmp_path: Path) -> None:
    """1024 positions a picture, 2048 a step: two pictures of sixteen, and of five what two steps leave, three."""
    files = filled(tmp_path / "files")
    found = taught(block(tmp_path / "m.onnx"), files)
    pairs = [slice(at, at + 2) for at in range(0, 16, 2)]
    assert found._trained == [(0, r) for r in pairs] + [(1, r) for r in pairs] + [(2, slice(0, 3)), (2, slice(3, 6))]
    x, wanted = files.get("feeds", 2, ["x"])["x"], files.get("theirs", 2, ["t"])["t"]
    assert x.shape[0] == 5
    with torch.no_grad():
        made = found._job.executor({"x": x})["h"]
        assert float(found._loss(2, slice(3, 6), hard=True)) == pytest.approx(
            float(losses.relative(made[3:], wanted[3:])), rel=1e-5
        )
    # One epoch takes every part once, in an order of its own.
    drawn = []
    found._loss = lambda i, rows, hard: drawn.append((i, rows)) or torch.zeros(())  # type: ignore[method-assign,assignment,func-returns-value]
    for step in range(18):
        [loss() for loss in found._losses(step, 0.0)]
    assert sorted(drawn, key=str) == sorted(found._trained, key=str)
    assert drawn != found._trained


WHOLE_BECAUSE = ["answers depend on the batch", "batches are as they are", "another first axis", "four at a time"]


@pytest.mark.parametrize("why", WHOLE_BECAUSE)
def test_micro_batches_stay_whole_where_a_part_is_no_batch(tmp_path: Path, why: str) -> None:
    files = filled(tmp_path / "files", (16, 16, 8, 16), stackable=why != "batches are as they are")
    if why == "another first axis":
        for i in range(files.n):
            files.put("theirs", i, {"t": torch.zeros(4, 16, 32, 32)})
    kind = {"mean_of_batch": why == "answers depend on the batch", "four_at_a_time": why == "four at a time"}
    found = taught(block(tmp_path / "m.onnx", **kind), files)
    assert found._trained == [(i, WHOLE) for i in range(3)]


def test_small_maps_and_matrices_are_taught_by_whole_micro_batches(tmp_path: Path) -> None:
    files = filled(tmp_path / "files", (1, 16, 16))
    assert taught(block(tmp_path / "m.onnx"), files)._trained[0] == (0, WHOLE)
    for shape in ((16, 4), (16, 4, 8, 8), (16, 100, 4)):
        for i in (1, 2):
            files.put("theirs", i, {"t": torch.zeros(shape)})
        assert taught(block(tmp_path / "m.onnx"), files)._parts(1) == [WHOLE]
    files.put("theirs", 1, {"t": torch.zeros(16, 512, 4)})  # (samples, positions, channels)
    assert taught(block(tmp_path / "m.onnx"), files)._parts(1) == [slice(at, at + 4) for at in range(0, 16, 4)]


@pytest.mark.parametrize(("coded", "most"), [(False, 1e-2), (True, 2e-2)])
def test_the_rate_follows_the_error_and_codes_go_further(tmp_path: Path, coded: bool, most: float) -> None:
    found = taught(block(tmp_path / "m.onnx", coded=coded), filled(tmp_path / "files"))
    assert list(found.parameters) == ["w"]
    assert [found.rate(e) for e in (0.0, 0.1, 0.25, 0.9)] == pytest.approx([5e-3, 5e-3, 7.5e-3, most])
    assert found.rate(float("nan")) == 5e-3


def test_what_was_seen_before_the_first_step_is_not_looked_for_twice(tmp_path: Path) -> None:
    found = taught(block(tmp_path / "m.onnx"), filled(tmp_path / "files"))
    looked = []
    real = found._loss
    found._loss = lambda i, rows=WHOLE, *, hard: looked.append(i) or real(i, rows, hard=hard)  # type: ignore[method-assign,func-returns-value]
    first = found.first()
    assert found._check().loss == first
    assert looked == [3]
    with torch.no_grad():
        next(iter(found.parameters.values())).mul_(2)
    assert found._check().loss != first
    assert looked == [3, 3]


def test_block_files_hold_what_was_put_in_as_it_was(tmp_path: Path) -> None:
    """Halves where they are near enough, the whole type where they are not, and never for numbers of things."""
    files = Files(tmp_path)
    files.n = 1
    given = {
        "small": torch.tensor([0.1, -3.25, 60000.0]), "large": torch.tensor([1.0, 70000.0]),
        "ids": torch.tensor([5, 2**40]), "double": torch.tensor([0.1], dtype=torch.float64), "none": torch.zeros(0, 3),
    }  # fmt: skip
    files.put("ours", 0, given)
    files.become("ours", "next")
    found = files.get("next", 0, list(given))
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in given.items()}
    assert torch.allclose(found["small"], given["small"], rtol=5e-4)
    assert not torch.equal(found["small"], given["small"])
    for name in ("large", "ids", "double", "none"):
        assert torch.equal(found[name], given[name])
    assert not files.has("ours", "small")


def test_a_weight_of_two_blocks_is_taught_in_the_first() -> None:
    """Else the later block would spoil what the earlier one was taught."""

    class Known:
        def parameters_by_name(self) -> dict[str, Any]:
            return {n: torch.nn.Parameter(torch.ones(2, 2)) for n in ("w", "tied")}

        def grids(self) -> dict[str, Any]:
            return {}

        def segment(self, *_: object) -> None:
            return None

    class Filled:
        n, checked, stackable = 8, 7, False

    blocks = [Block(("x",), Pair("h", "h"), ("tied",)), Block(("h",), None, ("w", "tied"))]
    job = layerwise.Blockwise(Known(), blocks, [1, 1], Recipe, {}, ["y"], lambda *_: torch.zeros(()))
    found = [layerwise._Taught(job, b, Filled(), k) for k, b in enumerate(blocks)]
    assert [list(t.parameters) for t in found] == [["tied"], ["w"]]

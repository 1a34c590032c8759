"""Distillation from the front door: better, reproducible, resumable after a kill, honest about what it cannot do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

import featherweight as fw  # noqa: E402
from featherweight.errors import BudgetError, DataError, ModelError, OutputError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402

SIDE, CLASSES = 12, 5


def deeper(i: int, source: str) -> list[onnx.NodeProto]:
    conv = helper.make_node(
        "Conv", [source, f"e{i}.w", f"e{i}.b"], [f"e{i}"], f"conv_e{i}", kernel_shape=[3, 3], pads=[1, 1, 1, 1]
    )
    return [conv, helper.make_node("Relu", [f"e{i}"], [f"re{i}"], f"relu_e{i}")]


def network(path: Path, seed: int, width: int = 8, noise: float = 0.0, levels: int = 0, deep: int = 0) -> Path:
    """A small classifier (n, 3, 12, 12) -> (n, 5); `noise` is added to weights, which may be rounded to a grid."""
    rng = np.random.default_rng(seed)
    extra = np.random.default_rng(seed + 100)
    sizes = {"a.w": (width, 3, 3, 3), "b.w": (width, width, 3, 3), "c.w": (width, width, 3, 3), "d.w": (CLASSES, width)}
    sizes = {**sizes, **{f"e{i}.w": (width, width, 3, 3) for i in range(deep)}}
    stored = []
    for name, shape in sizes.items():
        w = rng.normal(size=shape) * 1.4 / np.sqrt(np.prod(shape[1:]))
        w += noise * extra.normal(size=shape) * w.std()
        bias = 0.1 * rng.normal(size=shape[0])
        stored += [(name, w.astype(np.float32)), (name.replace("w", "b"), bias.astype(np.float32))]
    nodes, initializers = [], []
    for name, array in stored:
        if levels and name.endswith("w"):
            scale = np.float32(np.abs(array).max() / levels)
            codes = np.clip(np.rint(array / scale), -levels, levels).astype(np.int8)
            initializers += [numpy_helper.from_array(codes, f"{name}.q"), numpy_helper.from_array(scale, f"{name}.s")]
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.s"], [name], f"{name}.dq"))
        else:
            initializers.append(numpy_helper.from_array(array, name))
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes += [
        helper.make_node("Conv", ["x", "a.w", "a.b"], ["a"], "conv_a", **pads),
        helper.make_node("Relu", ["a"], ["ra"], "relu_a"),
        helper.make_node("Conv", ["ra", "b.w", "b.b"], ["b"], "conv_b", **pads),
        helper.make_node("Relu", ["b"], ["rb"], "relu_b"),
        helper.make_node("Conv", ["rb", "c.w", "c.b"], ["c"], "conv_c", **pads),
        helper.make_node("Add", ["c", "ra"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["rs"], "relu_s"),
        *(n for i in range(deep) for n in deeper(i, "rs" if i == 0 else f"re{i - 1}")),
        helper.make_node("GlobalAveragePool", [f"re{deep - 1}" if deep else "rs"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "d.w", "d.b"], ["logits"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])], initializers,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distill")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(150, 3, SIDE, SIDE)).astype(np.float32)
    x += 2 * rng.normal(size=(150, 3, 1, 1)).astype(np.float32)
    np.savez(place / "data.npz", x=x)
    network(place / "teacher.onnx", 1)
    network(place / "noisy.onnx", 1, noise=0.4)
    network(place / "narrow.onnx", 1, width=6)
    network(place / "coarse.onnx", 1, levels=2)
    network(place / "deep-teacher.onnx", 1, deep=3)
    network(place / "deep.onnx", 1, noise=0.3, deep=3)
    return place


def teach(folder: Path, student: str, **asked: object) -> fw.Distilled:
    given: dict[str, object] = {"max_steps": 60, "threads": 1, "batch_size": 16, "metric": "kl", **asked}
    teacher = "deep-teacher.onnx" if student == "deep.onnx" else "teacher.onnx"
    return fw.distill(folder / teacher, folder / student, folder / "data.npz", **given)


@pytest.mark.parametrize("stages", [("end",), ("layers",), ("layers", "end")])
def test_a_damaged_student_comes_back(folder: Path, tmp_path: Path, stages: tuple[str, ...]) -> None:
    found = teach(folder, "noisy.onnx", stages=stages, out=tmp_path / "run", rate=5e-3)
    assert found.before.drop is not None
    assert found.after.drop is not None
    assert found.after.drop < 0.7 * found.before.drop
    assert [s.name for s in found.stages] == list(stages)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"model.onnx", "report.json", "report.html"}
    assert "KL divergence" in found.losses[0]


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [("n", 1), (1, "n"), (1, 1), (5, "n"), ("n", 5)])
def test_a_fixed_batch_axis_is_kept_to(
    folder: Path, tmp_path: Path, teacher_rows: int | str, student_rows: int | str
) -> None:
    """Exporters fix a batch of 1 in shapes and in what Reshape is told; more rows at a time would be nonsense."""
    files = []
    for source, rows in (("teacher.onnx", teacher_rows), ("noisy.onnx", student_rows)):
        model = onnx.load(folder / source)
        for value, shape in ((model.graph.input[0], [rows, 3, SIDE, SIDE]), (model.graph.output[0], [rows, CLASSES])):
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
        flat = next(n for n in model.graph.node if n.op_type == "Flatten")
        if rows != "n":
            flat.op_type = "Reshape"
            flat.input.append("shape")
            width = 8
            model.graph.initializer.append(numpy_helper.from_array(np.array([rows, width]), "shape"))
        files.append(tmp_path / source)
        onnx.save(model, files[-1])
    found = fw.distill(
        *files, folder / "data.npz", max_steps=30, threads=1, batch_size=15, metric="kl", rate=5e-3,
        stages=("layers", "end"), out=tmp_path / "run",
    )  # fmt: skip
    assert found.before.drop is not None
    assert found.after.drop is not None
    assert found.after.drop < 0.9 * found.before.drop
    shapes = [io.load(f).graph.inputs[0].shape for f in (found.model, files[1])]
    assert shapes[0] == shapes[1]


def test_each_block_goes_on_from_the_ones_before(folder: Path, tmp_path: Path) -> None:
    found = teach(folder, "deep.onnx", stages=("layers",), out=tmp_path / "run", rate=5e-3, max_steps=100)
    blocks = found.stages[0].blocks
    assert len(blocks) >= 3
    assert all(b.after <= b.before for b in blocks)
    assert sum(b.after < b.before for b in blocks) >= 2


def test_codes_are_trained_and_stay_codes(folder: Path, tmp_path: Path) -> None:
    found = teach(folder, "coarse.onnx", stages=("end",), out=tmp_path / "run", max_steps=100, rate=3e-2)
    assert found.recovered is not None
    assert found.recovered > 0.3
    before, after = (io.load(p).graph.initializers for p in (folder / "coarse.onnx", found.model))
    assert {n: v.dtype for n, v in before.items()} == {n: v.dtype for n, v in after.items()}
    changed = 0
    for name in before:
        old, new = before[name].const_value.numpy(), after[name].const_value.numpy()
        changed += int((old != new).sum()) if name.endswith(".q") else 0
        assert not name.endswith(".q") or np.abs(new).max() <= 127
    assert changed > 0


def test_same_seed_same_file(folder: Path, tmp_path: Path) -> None:
    files = [teach(folder, "noisy.onnx", out=tmp_path / n, max_steps=10).model.read_bytes() for n in "ab"]
    assert files[0] == files[1]
    other = teach(folder, "noisy.onnx", out=tmp_path / "c", max_steps=10, seed=1).model.read_bytes()
    assert other != files[0]


SCRIPT = """
import sys
from featherweight.learn import layerwise, training
training.CHECKPOINT_S = 0.0
layerwise.POSITIONS = 512
import featherweight as fw
folder, out, resume = sys.argv[1:4]
student = sys.argv[4] if len(sys.argv) > 4 else "noisy.onnx"
fw.distill(folder + "/teacher.onnx", folder + "/" + student, folder + "/data.npz", out=out, max_steps=36, threads=1,
           batch_size=16, metric="kl", stages="layers,end", resume=resume == "resume")
"""


@pytest.mark.parametrize("student", ["noisy.onnx", "narrow.onnx"])
def test_killed_and_resumed_ends_where_the_whole_run_ends(folder: Path, tmp_path: Path, student: str) -> None:
    """Blocks take parts of a micro-batch as steps; tensors of the narrow student are mapped to the teacher's."""

    def run(out: str, how: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / out), how, student])

    assert run("whole", "new").wait() == 0
    for kill_at in (3, 100_000_004):  # inside the blocks, and inside the end-to-end stage
        process = run("killed", "resume")
        checkpoints = tmp_path / "killed" / "work" / "checkpoints"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            steps = [int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")]
            if steps and max(steps) >= kill_at:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run("killed", "resume").wait() == 0
    assert (tmp_path / "killed" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert not (tmp_path / "killed" / "work").exists()


def test_interrupt_keeps_the_best_so_far(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = SCRIPT.replace("max_steps=36", "max_steps=100000")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out), "new"])
    while not list((out / "work" / "checkpoints").glob("step-*")):
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert (out / "model.onnx").exists()
    assert (out / "report.html").exists()
    assert (out / "work" / "checkpoints").exists()
    with pytest.raises(OutputError, match="--resume"):
        teach(folder, "noisy.onnx", out=out)


def test_another_request_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    from featherweight.learn.checkpoints import Checkpoints

    Checkpoints(tmp_path / "c", {"seed": 0, "a": (1, 2)}).write(3, {"x": 1}, {"t": torch.zeros(2)})
    assert Checkpoints(tmp_path / "c", {"seed": 0, "a": [1, 2]}).read() is not None
    with pytest.raises(DataError, match="seed was 0 and is 1"):
        Checkpoints(tmp_path / "c", {"seed": 1, "a": [1, 2]}).read()


def test_memory_limit_splits_steps_or_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="at least"):
        teach(folder, "noisy.onnx", out=tmp_path / "a", max_memory="10MB")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        ({"stages": ("middle",)}, DataError, "stages must be"),
        ({"labels": True}, DataError, "no labels"),
        ({"augment": "blur"}, DataError, "augment must be"),
        ({"rate": 0.0}, BudgetError, "rate must be > 0"),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, asked: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        teach(folder, "noisy.onnx", out=tmp_path / "run", **asked)


def test_another_interface_is_refused(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "teacher.onnx")
    model.graph.input[0].name = "y"
    model.graph.node[0].input[0] = "y"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ModelError):
        teach(folder, str(tmp_path / "other.onnx"), out=tmp_path / "run")


@pytest.mark.parametrize(("rounding", "rate"), [("straight", 2e-2), ("learned", 3e-3)])
def test_blocks_learn_which_codes_move(folder: Path, tmp_path: Path, rounding: str, rate: float) -> None:
    """Whole codes come out, by learned rounding each at most a step from where it was, and the answers are nearer."""
    network(folder / "eight.onnx", 1, noise=0.2, levels=7)
    found = teach(
        folder, "eight.onnx", stages=("layers",), out=tmp_path / "run", max_steps=160, rate=rate,
        rounding=rounding, train_scales="none",
    )  # fmt: skip
    assert all(b.after <= b.before for b in found.stages[0].blocks)
    assert found.after.drop is not None
    assert found.before.drop is not None
    assert found.after.drop < found.before.drop
    before, after = (io.load(p).graph.initializers for p in (folder / "eight.onnx", found.model))
    moved = [
        after[n].const_value.numpy().astype(int) - before[n].const_value.numpy() for n in before if n.endswith(".q")
    ]
    steps = {int(x) for m in moved for x in np.unique(m)}
    assert {-1, 0, 1} <= steps
    assert rounding == "straight" or steps == {-1, 0, 1}


def test_inner_values_computed_again_give_the_same_gradients(folder: Path) -> None:
    from featherweight.graph import surgery
    from featherweight.learn import blocks
    from featherweight.learn.blocks import Pair
    from featherweight.learn.student import Student, saved_bytes

    model = io.load(folder / "deep.onnx")
    surgery.sort(model)
    student = Student(model, train_scales="none")
    x = torch.randn(4, 3, SIDE, SIDE)
    cuts = ["ra", "rs"]
    found = {b.end.student: b for b in blocks.blocks(model, [Pair(c, c) for c in cuts])}

    def gradients() -> tuple[dict[str, Any], int]:
        for p in student.parameters().values():
            p.grad = None
        kept: list[Any] = []
        size = saved_bytes(lambda: kept.append(student.forward({"x": x}, cuts)["logits"].square().sum()))
        kept[0].backward()
        return {n: p.grad.clone() for n, p in student.parameters().items() if p.grad is not None}, size

    plain, whole = gradients()
    student.recompute_between(cuts, [*(found[c].starts for c in cuts), blocks.reads_behind(model, "rs")])
    again, less = gradients()
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-6) for n in plain)
    assert less < whole


def test_what_is_behind_the_last_place_is_taught_too(folder: Path, tmp_path: Path) -> None:
    """A head that alone is damaged comes back in the layers stage: it is the last block, taught by the outputs."""
    model = onnx.load(folder / "teacher.onnx")
    head = next(t for t in model.graph.initializer if t.name == "d.w")
    array = numpy_helper.to_array(head)
    noise = np.random.default_rng(0).normal(size=array.shape) * array.std()
    head.CopyFrom(numpy_helper.from_array((array + 0.5 * noise).astype(np.float32), "d.w"))
    onnx.save(model, folder / "head.onnx")
    found = teach(folder, "head.onnx", stages=("layers",), out=tmp_path / "run", rate=5e-3, max_steps=200)
    assert found.stages[0].blocks[-1].name == "outputs"
    assert found.recovered is not None
    assert found.recovered > 0.5


def test_calibration_data_may_stand_beside_the_data_it_is_reported_on(folder: Path, tmp_path: Path) -> None:
    x = np.load(folder / "data.npz")["x"]

    def first() -> Any:
        yield from ({"x": x[i : i + 10]} for i in range(0, 100, 10))

    def second() -> Any:
        yield from ({"x": x[i : i + 10]} for i in range(100, 150, 10))

    found = fw.distill(
        folder / "teacher.onnx", folder / "noisy.onnx", second, calibration=first, max_steps=2, threads=1,
        metric="kl", out=tmp_path / "run",
    )  # fmt: skip
    assert found.facts["samples"] == {"training": 100, "validation": 20, "holdout": 30}


def test_maps_are_compared_not_their_means(folder: Path) -> None:
    """Behind the last filters the map before pooling is the place: it says more than its mean does."""
    from featherweight.graph import surgery
    from featherweight.graph.channels.sizes import concrete
    from featherweight.learn import blocks

    model = io.load(folder / "teacher.onnx")
    surgery.sort(model)
    shapes = concrete(model, {"x": (2, 3, SIDE, SIDE)})
    assert [p.student for p in blocks.pairs(model, (shapes, shapes))] == ["ra", "rs"]


def test_what_is_not_asked_follows_from_the_student(folder: Path, tmp_path: Path) -> None:
    """What is the teacher block for block is taught so first, another shape end to end; one near to it slowly."""
    network(folder / "near.onnx", 1, noise=0.01)
    given: dict[str, Any] = {"max_steps": 2, "threads": 1, "metric": "kl"}
    found = {
        name: fw.distill(folder / "teacher.onnx", folder / f"{name}.onnx", folder / "data.npz", **given)
        for name in ("noisy", "near", "coarse")
    }
    both = ["layers", "end"]
    assert {n: [s.name for s in f.stages] for n, f in found.items()} == dict.fromkeys(found, both)
    shorter = fw.distill(folder / "deep-teacher.onnx", folder / "noisy.onnx", folder / "data.npz", **given)
    assert [s.name for s in shorter.stages] == ["end"]
    rates = {n: f.facts["rate"] for n, f in found.items()}
    assert rates["near"] == pytest.approx(5e-4)
    assert rates["near"] < rates["noisy"] <= 5e-3
    assert found["noisy"].facts["temperature"] == 4.0


@pytest.mark.parametrize("student", ["noisy.onnx", "coarse.onnx"])
def test_frozen_weights_stay(folder: Path, tmp_path: Path, student: str) -> None:
    found = teach(folder, student, out=tmp_path / "run", freeze="a.w, d.*", rate=3e-2, max_steps=100)
    before, after = (io.load(p).graph.initializers for p in (folder / student, found.model))
    same = {n for n in before if np.array_equal(before[n].const_value.numpy(), after[n].const_value.numpy())}
    end = ".q" if student == "coarse.onnx" else ""
    assert {f"a.w{end}", f"d.w{end}", "d.b"} <= same
    assert not {f"b.w{end}", "a.b"} & same
    with pytest.raises(ModelError, match=r"no weight to freeze is named 'zz\*'; weights are "):
        teach(folder, student, out=tmp_path / "other", freeze="zz*")


def test_a_folder_that_holds_a_run_is_left_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("journal.sqlite", "model.onnx", "report.json"):
        place = tmp_path / name.split(".")[0]
        (place / "work").mkdir(parents=True)
        (place / name).write_text("theirs")
        with pytest.raises(OutputError, match="already holds a run"):
            teach(folder, "noisy.onnx", out=place)
        assert (place / name).read_text() == "theirs"
        assert (place / "work").exists()


def test_labels_need_class_scores(folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "data.npz") as held:
        np.savez(tmp_path / "labelled.npz", x=held["x"], label=np.zeros(len(held["x"]), np.int64))
    with pytest.raises(DataError, match="--labels needs an output of class scores"):
        fw.distill(
            folder / "teacher.onnx", folder / "noisy.onnx", tmp_path / "labelled.npz", labels=True, loss="mse",
            max_steps=2, threads=1, out=tmp_path / "run",
        )  # fmt: skip


def test_data_in_another_order_are_not_resumed(folder: Path, tmp_path: Path) -> None:
    """The parts would be others, and what is reported on might have been taught."""
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    code = SCRIPT.replace("max_steps=36", "max_steps=100000")
    asked = [sys.executable, "-c", code, str(own), str(tmp_path / "run")]
    process = subprocess.Popen([*asked, "new"])
    while not list((tmp_path / "run" / "work" / "checkpoints").glob("step-*")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    with np.load(own / "data.npz") as held:
        x = held["x"]
    np.savez(own / "data.npz", x=x[::-1])
    again = subprocess.run([*asked, "resume"], capture_output=True, text=True, check=False)
    assert again.returncode
    assert "data kept aside was" in again.stderr


def test_what_a_teacher_rules_out_adds_nothing_to_the_divergence() -> None:
    from featherweight.learn.losses import divergence

    student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    loss = divergence(student, torch.tensor([[0.0, 1.0, -torch.inf]]), axis=1)
    q = torch.softmax(student.detach(), 1)[0]
    p = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    assert float(loss.detach()) == pytest.approx(float((p * (p.log() - q[:2].log())).sum()), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(student.grad[0].numpy(), q.numpy() - np.append(p.numpy(), 0), rtol=1e-4, atol=1e-6)


def test_a_stage_that_comes_nearer_only_when_softened_is_taken_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softened scores can come nearer while the answers as they are used go away."""
    from featherweight.learn.matching import Check, Checker

    asked: list[float | None] = []

    def told(_self: Checker, temperature: float | None = None) -> Check:
        asked.append(temperature)
        return Check(1.0 / len(asked), None)

    monkeypatch.setattr(Checker, "__call__", told)
    found = teach(folder, "noisy.onnx", stages=("end",), out=tmp_path / "run", rate=5e-3, max_steps=10)
    (stage,) = found.stages
    assert stage.loss_after < stage.loss_before
    assert asked[-2:] == [1.0, 1.0], "with what was taught, then with what was there before, which is told to be nearer"
    assert not stage.kept
    assert stage.reason.startswith("only the softened validation loss fell")
    given, left = (io.load(p).graph.initializers for p in (folder / "noisy.onnx", found.model))
    for name in ("a.w", "d.w"):
        np.testing.assert_array_equal(left[name].const_value.numpy(), given[name].const_value.numpy())


def test_blocks_are_checked_on_validation_data_alone(folder: Path, tmp_path: Path) -> None:
    """What is drawn for training comes back changed, once a view; what checks comes unchanged, once."""
    from featherweight.core import Silent
    from featherweight.learn.augment import Augment
    from featherweight.learn.layerwise import Files, views_for
    from featherweight.learn.teacher import Lessons, Teacher
    from featherweight.search.problem import input_specs

    data = fw.data.open_data(folder / "data.npz", input_specs(io.load(folder / "teacher.onnx")))
    teacher = Teacher(io.load(folder / "teacher.onnx"), ["rs"], tmp_path, threads=1)

    def lessons(part: range, how: Augment) -> Lessons:
        return Lessons(data.subset(part), teacher, batch=10, micro=5, seed=0, how=how, labels=False)

    training, checks = lessons(range(100), Augment(flip=True)), lessons(range(100, 120), Augment())
    files = Files(tmp_path / "files")
    files.fill(training, checks, ["rs"], 3, Silent())
    assert (files.checked, files.n) == (60, 64)
    with np.load(folder / "data.npz") as held:
        rows = {x.tobytes() for x in held["x"][100:120]}
    seen = [x.tobytes() for i in range(60, 64) for x in files.get("feeds", i, ["x"])["x"].contiguous().numpy()]
    assert set(seen) == rows
    assert len(seen) == 20
    trained = {x.tobytes() for i in range(60) for x in files.get("feeds", i, ["x"])["x"].contiguous().numpy()}
    assert not trained & rows
    assert [views_for(s, None, training) for s in (1, 100, 200, 1e6)] == [1, 1, 3, 8]
    assert [views_for(float("inf"), n, training) for n in (1, 39, 40, 1000)] == [1, 1, 2, 8]
    files.fill(training, checks, ["rs"], 3, Silent(), enough=lambda: True)
    assert (files.checked, files.n) == (1, 5)  # validation data are drawn whole whatever the clock says


@pytest.mark.parametrize("asked", [{"rounding": "up"}, {"train_scales": "some"}])
def test_an_unknown_choice_is_refused(folder: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(DataError, match=f"{name} must be one of .*, but got '{asked[name]}'"):
        teach(folder, "noisy.onnx", out=tmp_path / "run", **asked)
    with pytest.raises(ValueError, match="train_scales must be one of none, weights, all, but got True"):
        Executor(io.load(folder / "teacher.onnx"), train_scales=True)

"""`.pt2` files from strangers: what could run code is refused before PyTorch sees it, what is broken is named."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from featherweight.convert import archive, to_onnx  # noqa: E402
from featherweight.errors import ModelError  # noqa: E402


class Small(torch.nn.Module):  # type: ignore[name-defined]
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("offset", torch.arange(4.0))

    def forward(self, x):
        return torch.nn.functional.gelu(self.fc(x), approximate="tanh") + self.offset


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(2, 4),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that appears if anything hidden was run."""
    return tmp_path / "it-ran"


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": Evil(marker)}, buffer)
    return buffer.getvalue()


def changed(good: Path, target: Path, edit: Callable[[dict[str, bytes]], None], **options) -> Path:
    """A copy of the archive with its members (without the root folder) edited."""
    with zipfile.ZipFile(good) as z:
        root = z.namelist()[0].partition("/")[0]
        members = {n.partition("/")[2]: z.read(n) for n in z.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w", **options) as out:
        for name, data in members.items():
            out.writestr(name if name.startswith(("/", "..")) else f"{root}/{name}", data)
    return target


PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


def in_json(member: str, edit: Callable[[dict], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        found = json.loads(members[member])
        edit(found)
        members[member] = json.dumps(found).encode()

    return apply


def test_a_program_keeps_names_axes_and_numbers(good, tmp_path):
    found = to_onnx(good, tmp_path / "out.onnx")
    assert found.largest_difference < 1e-5
    assert [dict(s) for s in found.sizes] == [{"batch": 1}, {"batch": 3}]
    model = ir.load(tmp_path / "out.onnx")
    assert {"fc.weight", "fc.bias", "offset"} <= set(model.graph.initializers)
    assert [str(d) for d in model.graph.inputs[0].shape] == ["batch", "4"]
    assert [v.name for v in model.graph.outputs] == ["output"]


def test_rebuilt_is_what_was_checked_and_says_nothing_of_where_it_was_made(good, tmp_path):
    archive.rebuild(good, tmp_path / "clean.pt2")
    text = (tmp_path / "clean.pt2").read_bytes()
    assert b"stack_trace" not in text
    assert __file__.encode() not in text
    program = torch.export.load(tmp_path / "clean.pt2")
    x = torch.randn(5, 4)
    assert torch.equal(program.module()(x), torch.export.load(good).module()(x))


def test_a_shape_expression_that_is_code(good, tmp_path, marker):
    def edit(members):
        text = members[PROGRAM].decode()
        name = json.loads(text)["range_constraints"].popitem()[0]
        old = json.dumps(f"Symbol('{name}', positive=True, integer=True)")
        assert old in text
        members[PROGRAM] = text.replace(old, json.dumps(f"__import__('os').mkdir('{marker}') or 1")).encode()

    bad = changed(good, tmp_path / "bad.pt2", edit)
    with pytest.raises(ModelError, match="shape expression") as refused:
        to_onnx(bad, tmp_path / "out.onnx")
    assert "--trust" in str(refused.value)
    assert not marker.exists()
    with pytest.raises(ModelError):  # what trust means: PyTorch itself evaluates it
        to_onnx(bad, tmp_path / "out.onnx", trust=True)
    assert marker.exists()


def with_target(name: str) -> Callable[[dict[str, bytes]], None]:
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = name

    return in_json(PROGRAM, edit)


def with_argument(value: str) -> Callable[[dict[str, bytes]], None]:
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = value

    return in_json(PROGRAM, edit)


def pickle_weight(config):
    next(iter(config["config"].values()))["use_pickle"] = True


def import_type(program):
    spec = json.dumps([1, {"type": "os.system", "context": "null", "children_spec": []}])
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec


def custom_object(program):
    program["graph_module"]["graph"]["inputs"][0] = {"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}
    program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.os.system"}


RUNS_CODE = {
    "operator": (with_target("torch.os.system"), "operator"),
    "loader": (with_target("torch.load"), "operator"),
    "file operator": (with_target("torch.ops.aten.from_file.default"), "operator"),
    "attribute": (with_target("torch.ops.aten.__class__.default"), "operator"),
    "argument name": (with_argument("x=1)\nimport os\n("), "name in 'name'"),
    "pickled weight": (in_json(WEIGHTS, pickle_weight), "is a pickle"),
    "argument type": (in_json(PROGRAM, import_type), "argument type 'os.system'"),
    "custom object": (in_json(PROGRAM, custom_object), "operator 'torch.os.system'"),
    "old weights": (lambda m: m.update({"data/weights/model.pt": b"x"}), "is a pickle"),
    "opaque constant": (lambda m: m.update({"data/constants/opaque_obj_0": b"x"}), "is a pickle"),
    "compiled code": (lambda m: m.update({"data/aotinductor/model/lib.so": b"x"}), "is compiled code"),
}


@pytest.mark.parametrize("name", RUNS_CODE)
def test_what_could_run_code_is_refused(name, good, tmp_path, monkeypatch):
    edit, says = RUNS_CODE[name]
    monkeypatch.setattr(torch.export, "load", lambda *_a, **_k: pytest.fail("PyTorch was given the file"))
    with pytest.raises(ModelError, match=says):
        to_onnx(changed(good, tmp_path / "bad.pt2", edit), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_pickled_examples_are_left_out_and_made_anew(good, tmp_path, marker):
    bad = changed(good, tmp_path / "bad.pt2", lambda m: m.update({"data/sample_inputs/model.pt": pickled(marker)}))
    assert to_onnx(bad, tmp_path / "out.onnx").largest_difference < 1e-5
    assert not marker.exists()


def test_guards_are_never_compiled(good, tmp_path):
    bad = changed(
        good, tmp_path / "bad.pt2", in_json(PROGRAM, lambda p: p.update(guards_code=["__import__('os').abort()"]))
    )
    archive.rebuild(bad, tmp_path / "clean.pt2")
    assert b"abort" not in (tmp_path / "clean.pt2").read_bytes()


BROKEN = {
    "compressed": (lambda _m: None, {"compression": zipfile.ZIP_DEFLATED}, "uncompressed"),
    "outside": (lambda m: m.update({"../../evil": b"x"}), {}, "points outside"),
    "absolute": (lambda m: m.update({"/etc/evil": b"x"}), {}, "points outside"),
    "no program": (lambda m: m.pop(PROGRAM), {}, "no program"),
    "no json": (lambda m: m.update({PROGRAM: b"{"}), {}, "not JSON"),
    "deep json": (lambda m: m.update({PROGRAM: b"[" * 100_000 + b"]" * 100_000}), {}, "corrupt|nested"),
    "weight missing": (lambda m: m.pop("data/weights/weight_0"), {}, "missing or empty"),
    "weight empty": (lambda m: m.update({"data/weights/weight_0": b""}), {}, "missing or empty"),
    "another format": (lambda m: m.update({"archive_format": b"zip"}), {}, "format pt2"),
    "two programs": (lambda m: m.update({"models/other.json": b"{}"}), {}, "more than one program"),
    "same name twice": (lambda m: m.update({PROGRAM.upper(): b"{}"}), {}, "twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives_are_named(name, good, tmp_path):
    edit, options, says = BROKEN[name]
    with pytest.raises(ModelError, match=says):
        archive.rebuild(changed(good, tmp_path / "bad.pt2", edit, **options), tmp_path / "clean.pt2")


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_truncated(share, good, tmp_path):
    (tmp_path / "cut.pt2").write_bytes(good.read_bytes()[: int(good.stat().st_size * share)])
    with pytest.raises(ModelError, match=r"not a readable .pt2"):
        to_onnx(tmp_path / "cut.pt2", tmp_path / "out.onnx")


@pytest.mark.parametrize(
    "text", ["9**9**9", "Pow(9, Pow(9, 9))", "s0.__class__", "(lambda: 1)()", "[1]", "'a' * 9", "s0 if s1 else s2", "x"]
)
def test_expressions_that_are_not_plain_arithmetic(text):
    from featherweight.convert.rules import checked_program

    with pytest.raises(ModelError, match="shape expression"):
        checked_program(json.dumps({"expr_str": text}).encode(), "a.pt2")


@pytest.mark.parametrize(
    "text", ["s0", "2*s0 + 1", "Symbol('s40', positive=True, integer=True)", "s0**2", "Max(1, FloorDiv(s0, 2))"]
)
def test_plain_arithmetic_passes(text):
    from featherweight.convert.rules import checked_program

    assert checked_program(json.dumps({"expr_str": text}).encode(), "a.pt2") == {"expr_str": text}


def test_training_mode_is_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    program = torch.export.export(net.train(), (torch.randn(2, 4),))
    with pytest.raises(ModelError, match=r"training mode.*module.eval\(\)"):
        to_onnx(program, tmp_path / "out.onnx")


def test_weights_without_a_network(tmp_path):
    torch.save(Small().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="can run any code"):
        to_onnx(tmp_path / "w.pt", tmp_path / "out.onnx")
    with pytest.raises(ModelError, match="no network to put them in"):
        to_onnx(tmp_path / "w.pt", tmp_path / "out.onnx", trust=True)


def test_random_damage_is_an_error_of_ours(good, tmp_path):
    rng = np.random.default_rng(0)
    data = bytearray(good.read_bytes())
    for round_ in range(40):
        hurt = bytearray(data)
        for place in rng.integers(0, len(hurt), 6):
            hurt[place] = int(rng.integers(0, 256))
        (tmp_path / "hurt.pt2").write_bytes(bytes(hurt))
        try:
            archive.rebuild(tmp_path / "hurt.pt2", tmp_path / f"{round_}.pt2")
        except ModelError:
            continue

"""Students: cut from the teacher, given as a file, made by a function. Cuts equal networks built by hand."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from featherweight.demo.network import Network
from featherweight.errors import DataError, ModelError
from featherweight.graph import io
from featherweight.graph.normalise import normalise
from featherweight.learn import narrow, repeats
from featherweight.learn.students import make_student
from featherweight.runtime import ort

WIDTH, HEADS, INNER, WORDS = 16, 4, 64, 30


class Encoder:
    """A transformer encoder with random weights; `layers` says which of six layers stand in the file."""

    def __init__(self, *, pre_norm: bool) -> None:
        self.pre_norm = pre_norm
        self.random = np.random.default_rng(0)
        self.stored: dict[str, np.ndarray] = {}

    def write(self, path: Path, layers=range(6), *, shared_shape: bool = False) -> Path:
        net = self.net = Network("encoder")
        ids = net.input("ids", ["batch", "sequence"], dtype=TensorProto.INT64)
        mask = net.input("mask", ["batch", 1, 1, "sequence"])
        x = net.node("Gather", [self.weight("table", WORDS, WIDTH), ids], "embedded")
        if not self.pre_norm:
            x = self.norm(x, "first")
        shape = net.node("Shape", [ids], "shape") if shared_shape else ""
        for i in layers:
            x = self.layer(x, mask, f"l{i}", shape)
        if self.pre_norm:
            x = self.norm(x, "last")
        x = net.node("ReduceMean", [x, net.weight("axis", np.array([1]))], "mean", keepdims=0)
        net.node("MatMul", [x, self.weight("head", WIDTH, 3)], "logits")
        net.output("logits", ["batch", 3])
        net.save(path)
        return path

    def weight(self, name: str, *shape: int) -> str:
        if name not in self.stored:
            self.stored[name] = (self.random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return self.net.weight(name, self.stored[name])

    def norm(self, x: str, name: str) -> str:
        one = self.net.weight("ones", np.ones(WIDTH, np.float32))
        bias = self.weight(f"{name}.bias", WIDTH)
        return self.net.node("LayerNormalization", [x, one, bias], f"{name}.norm", axis=-1)

    def layer(self, x: str, mask: str, at: str, shape: str) -> str:
        y = self.attention(self.norm(x, f"{at}.a") if self.pre_norm else x, mask, f"{at}.attention", shape)
        x = self.net.node("Add", [x, y], f"{at}.sum")
        x = x if self.pre_norm else self.norm(x, f"{at}.a")
        y = self.norm(x, f"{at}.b") if self.pre_norm else x
        y = self.net.node(
            "Relu", [self.net.node("MatMul", [y, self.weight(f"{at}.up", WIDTH, INNER)], f"{at}.u")], f"{at}.r"
        )
        y = self.net.node("MatMul", [y, self.weight(f"{at}.down", INNER, WIDTH)], f"{at}.d")
        x = self.net.node("Add", [y, x], f"{at}.out")
        return x if self.pre_norm else self.norm(x, f"{at}.b")

    def attention(self, x: str, mask: str, at: str, shape: str) -> str:
        net = self.net
        split = net.weight("split", np.array([0, 0, HEADS, WIDTH // HEADS]))
        if shape:
            tail = net.weight("tail", np.array([HEADS, WIDTH // HEADS]))
            split = net.node("Concat", [shape, tail], f"{at}.split", axis=0)
        parts = []
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            y = net.node("MatMul", [x, self.weight(f"{at}.{name}", WIDTH, WIDTH)], f"{at}.{name}.y")
            y = net.node("Reshape", [y, split], f"{at}.{name}.split")
            parts.append(net.node("Transpose", [y], f"{at}.{name}.heads", perm=perm))
        scores = net.node("Add", [net.node("MatMul", parts[:2], f"{at}.scores"), mask], f"{at}.masked")
        y = net.node("MatMul", [net.node("Softmax", [scores], f"{at}.soft"), parts[2]], f"{at}.context")
        y = net.node("Transpose", [y], f"{at}.rows", perm=[0, 2, 1, 3])
        y = net.node("Reshape", [y, net.weight("join", np.array([0, 0, WIDTH]))], f"{at}.joined")
        return net.node("MatMul", [y, self.weight(f"{at}.o", WIDTH, WIDTH)], f"{at}.y")


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "ids": random.integers(0, WORDS, (3, 7)),
        "mask": np.where(np.arange(7) < 5, 0, -1e4).astype(np.float32).reshape(1, 1, 1, 7).repeat(3, 0),
    }


def run(path: Path, fed=None) -> np.ndarray:
    [output] = ort.run_model(path, [fed or feeds()])[0].values()
    return output


def found_blocks(path: Path):
    return repeats.blocks(normalise(io.load(path), run=None).model)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("shared_shape", [False, True])
def test_layers_of_an_encoder_are_found(tmp_path, pre_norm, shared_shape):
    encoder = Encoder(pre_norm=pre_norm)
    found = found_blocks(encoder.write(tmp_path / "t.onnx", shared_shape=shared_shape))
    ends = ["out" if pre_norm else "b.norm"] * 6
    assert [b.end.name for b in found] == [f"l{i}.{e}" for i, e in enumerate(ends)]
    assert found[0].start.name == ("embedded" if pre_norm else "first.norm")


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize(("spec", "kept"), [("layers=3", (0, 2, 5)), ("layers=0,1,4", (0, 1, 4)), ("layers=5,", (5,))])
def test_cut_layers_equal_truncation_by_hand(tmp_path, pre_norm, spec, kept):
    encoder = Encoder(pre_norm=pre_norm)
    teacher = encoder.write(tmp_path / "t.onnx")
    made = make_student(teacher, spec, tmp_path / "s.onnx")
    by_hand = encoder.write(tmp_path / "h.onnx", kept)
    np.testing.assert_array_equal(run(made.path), run(by_hand))
    assert made.path.stat().st_size < 1.1 * by_hand.stat().st_size + 2000
    assert "blocks " + ", ".join(map(str, kept)) in made.notes[0].text


def test_pairs_say_which_hidden_states_correspond(tmp_path):
    teacher = Encoder(pre_norm=False).write(tmp_path / "t.onnx")
    made = make_student(teacher, "layers=0,2,3", tmp_path / "s.onnx")
    assert made.pairs == (("l1.b.norm", "l0.b.norm"), ("l2.b.norm", "l2.b.norm"), ("l5.b.norm", "l3.b.norm"))
    values = {o.name for n in io.load(made.path).graph for o in n.outputs}
    assert {student for _, student in made.pairs} <= values


def test_unlike_layers_are_no_blocks(tmp_path):
    net = Network("plain")
    x = net.input("x", ["batch", 4])
    for i, width in enumerate((8, 8, 8)):
        y = net.node("MatMul", [x, net.weight(f"w{i}", np.ones((4, width), np.float32))], f"y{i}")
        y = net.node("MatMul", [y, net.weight(f"v{i}", np.ones((width, 4), np.float32))], f"z{i}")
        x = net.node("Add", [x, y], f"x{i}") if i != 1 else net.node("Sub", [x, y], f"x{i}")
    net.output(x, ["batch", 4])
    net.save(tmp_path / "t.onnx")
    assert found_blocks(tmp_path / "t.onnx") == ()
    with pytest.raises(ModelError, match="width=50%"):
        make_student(tmp_path / "t.onnx", "layers=1", tmp_path / "s.onnx")


def test_equal_layers_without_a_branch_are_no_blocks(tmp_path):
    net = Network("chain")
    x = net.input("x", ["batch", 4])
    for i in range(4):
        x = net.node(
            "Relu", [net.node("MatMul", [x, net.weight(f"w{i}", np.eye(4, dtype=np.float32))], f"y{i}")], f"r{i}"
        )
    net.output(x, ["batch", 4])
    net.save(tmp_path / "t.onnx")
    assert found_blocks(tmp_path / "t.onnx") == ()


def residual(path: Path, *, tap: bool = False, n: int = 3) -> Path:
    """Residual convolutions with inner width 16; the last sum is the output. `tap`: the middle of one is one too."""
    random = np.random.default_rng(0)
    net = Network("residual")
    x = net.input("x", ["batch", 8, 6, 6])
    for i in range(n):
        up = net.weight(f"up{i}", random.standard_normal((16, 8, 1, 1)).astype(np.float32))
        down = net.weight(f"down{i}", random.standard_normal((8, 16, 3, 3)).astype(np.float32))
        y = net.node("Relu", [net.node("Conv", [x, up], f"u{i}")], f"r{i}")
        if tap and i == 1:
            net.output(y, ["batch", 16, 6, 6])
        x = net.node("Add", [x, net.node("Conv", [y, down], f"d{i}", pads=[1, 1, 1, 1])], f"x{i}")
    net.output(x, ["batch", 8, 6, 6])
    net.save(path)
    return path


def test_the_output_keeps_its_name_when_the_last_block_goes(tmp_path):
    teacher = residual(tmp_path / "t.onnx")
    made = make_student(teacher, "layers=0,1", tmp_path / "s.onnx")
    fed = {"x": np.random.default_rng(2).standard_normal((2, 8, 6, 6)).astype(np.float32)}
    assert ort.session(made.path).outputs[0].name == "x2"
    np.testing.assert_array_equal(run(made.path, fed), run(residual(tmp_path / "h.onnx", n=2), fed))
    assert made.pairs[-1] == ("x2", "x2")


def test_a_block_whose_inside_is_read_elsewhere_stays(tmp_path):
    teacher = residual(tmp_path / "t.onnx", tap=True)
    with pytest.raises(ModelError, match=r"cannot be left out|none were found"):
        make_student(teacher, "layers=0,2", tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()


def test_width_removes_the_weakest_channels(tmp_path):
    teacher = residual(tmp_path / "t.onnx")
    model = io.load(teacher)
    for i in range(3):
        for name, axis in ((f"up{i}", 0), (f"down{i}", 1)):
            value = model.graph.initializers[name]
            array = value.const_value.numpy().copy()
            np.moveaxis(array, axis, 0)[::2] *= 1e-3
            value.const_value = ir.tensor(array, name=name)
    io.save(model, teacher)
    made = make_student(teacher, "width=50%", tmp_path / "s.onnx")
    left = io.load(made.path).graph.initializers
    full = io.load(teacher).graph.initializers
    for i in range(3):
        np.testing.assert_array_equal(left[f"up{i}"].const_value.numpy(), full[f"up{i}"].const_value.numpy()[1::2])
    fed = {"x": np.random.default_rng(2).standard_normal((2, 8, 6, 6)).astype(np.float32)}
    np.testing.assert_allclose(run(made.path, fed), run(teacher, fed), rtol=1e-3, atol=0.1)


def test_width_and_layers_together_and_by_pattern(tmp_path):
    teacher = Encoder(pre_norm=False).write(tmp_path / "t.onnx")
    made = make_student(teacher, "layers=2; width=50%", tmp_path / "s.onnx")
    stored = {k: tuple(v.shape) for k, v in io.load(made.path).graph.initializers.items()}
    assert stored["l0.up"] == (WIDTH, INNER // 2)
    assert stored["l5.attention.q"] == (WIDTH, WIDTH // 2)  # two of four heads
    assert "l1.up" not in stored
    assert run(made.path).shape == (3, 3)
    only = make_student(teacher, "width=50%:*.u/*", tmp_path / "u.onnx")
    stored = {k: tuple(v.shape) for k, v in io.load(only.path).graph.initializers.items()}
    assert stored["l5.up"] == (WIDTH, INNER // 2)
    assert stored["l5.attention.q"] == (WIDTH, WIDTH)


def test_the_teacher_file_is_not_touched(tmp_path):
    teacher = Encoder(pre_norm=False).write(tmp_path / "t.onnx")
    before = teacher.read_bytes()
    make_student(teacher, "layers=2 width=50%", tmp_path / "s.onnx")
    assert teacher.read_bytes() == before


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("layers=0", "1 to 6"),
        ("layers=7", "1 to 6"),
        ("layers=1,9", "0 to 5"),
        ("layers=1,1", "different"),
        ("layers=few", "a list such as"),
        ("layers=2 layers=3", "once"),
        ("width=0%", "between 0 and 1"),
        ("width=100%", "between 0 and 1"),
        ("width=half", "between 0 and 1"),
        ("width=50%:nothing*", "could be removed|none could"),
        ("depth=3", "must be"),
        ("", "must be"),
        ("absent.onnx", "no file of that name"),
    ],
)
def test_wrong_specs_say_what_is_right(tmp_path, spec, said):
    teacher = Encoder(pre_norm=False).write(tmp_path / "t.onnx")
    with pytest.raises(ModelError, match=said):
        make_student(teacher, spec, tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()


def test_a_given_file_is_used_where_it_lies_if_its_interface_fits(tmp_path):
    encoder = Encoder(pre_norm=False)
    teacher = encoder.write(tmp_path / "t.onnx")
    given = encoder.write(tmp_path / "given.onnx", (0,))
    assert make_student(teacher, str(given), tmp_path / "s.onnx").path == given
    other = residual(tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="inputs must be called as its teacher's: ids, mask"):
        make_student(teacher, str(other), tmp_path / "s.onnx")


def test_a_shape_that_differs_is_refused(tmp_path):
    def small(path, width):
        net = Network("small")
        net.node("MatMul", [net.input("x", ["n", 4]), net.weight("w", np.ones((4, width), np.float32))], "y")
        net.output("y", ["n", width])
        net.save(path)
        return path

    with pytest.raises(ModelError, match=r"'y' must be FLOAT \(n, 3\)"):
        make_student(small(tmp_path / "t.onnx", 3), str(small(tmp_path / "s.onnx", 2)), tmp_path / "o.onnx")


def test_a_function_may_return_an_onnx_model(tmp_path, monkeypatch):
    teacher = residual(tmp_path / "t.onnx")
    residual(tmp_path / "one.onnx", n=1)
    model = io.load(tmp_path / "one.onnx")
    model.graph.outputs[0].name = "x2"
    io.save(model, tmp_path / "one.onnx")
    (tmp_path / "student_maker.py").write_text(
        "from pathlib import Path\nfrom featherweight.graph import io\n"
        "def path():\n    return Path(__file__).with_name('one.onnx')\n"
        "def model():\n    return io.load(path())\ndef number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "student_maker", raising=False)
    made = make_student(teacher, "student_maker:model", tmp_path / "s.onnx")
    fed = {"x": np.ones((1, 8, 6, 6), np.float32)}
    np.testing.assert_array_equal(run(made.path, fed), run(tmp_path / "one.onnx", fed))
    assert make_student(teacher, "student_maker:path", tmp_path / "s.onnx").path == tmp_path / "one.onnx"
    with pytest.raises(DataError, match="no function 'absent'"):
        make_student(teacher, "student_maker:absent", tmp_path / "s.onnx")


def test_a_function_that_draws_its_weights_gives_the_same_student_each_time(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    teacher = residual(tmp_path / "t.onnx")
    drawing = TORCH_STUDENT.replace("    torch.manual_seed(0)\n", "").replace("def module", "def drawn")
    (tmp_path / "drawing_maker.py").write_text(drawing)
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / f"{i}.onnx" for i in range(3)]
    for path, seed in zip(files, (0, 0, 1), strict=True):
        make_student(teacher, "drawing_maker:drawn", path, seed=seed)
    first, again, other = (path.read_bytes() for path in files)
    assert first == again != other


def test_what_a_function_may_do_wrong_is_said(tmp_path, monkeypatch):
    teacher = residual(tmp_path / "t.onnx")
    (tmp_path / "failing_maker.py").write_text("def model():\n    return 1 / 0\n")
    (tmp_path / "proto_maker.py").write_text("import onnx\ndef model():\n    return onnx.load('t.onnx')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"student function 'failing_maker:model' failed \(ZeroDivisionError"):
        make_student(teacher, "failing_maker:model", tmp_path / "s.onnx")
    with pytest.raises(DataError, match="the student function 'not_there:model' cannot be imported"):
        make_student(teacher, "not_there:model", tmp_path / "s.onnx")
    made = make_student(teacher, "proto_maker:model", tmp_path / "s.onnx")
    fed = {"x": np.ones((1, 8, 6, 6), np.float32)}
    np.testing.assert_array_equal(run(made.path, fed), run(teacher, fed))


def test_spread_keeps_both_ends():
    assert [narrow.spread(6, k) for k in (1, 2, 3, 6)] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]
    assert all(len(set(narrow.spread(n, k))) == k for n in range(1, 40) for k in range(1, n + 1))


TORCH_STUDENT = """
import torch

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, pixels):
        return self.inner(pixels).relu()

def module():
    torch.manual_seed(0)
    return Small().eval()

def wrong():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(288, 5)).eval()
"""


def test_a_function_may_return_a_torch_module_which_takes_the_teachers_names(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    teacher = residual(tmp_path / "t.onnx")
    (tmp_path / "torch_student_maker.py").write_text(TORCH_STUDENT)
    monkeypatch.chdir(tmp_path)
    made = make_student(teacher, "torch_student_maker:module", tmp_path / "s.onnx")
    session = ort.session(made.path)
    assert [i.name for i in session.inputs] == ["x"]
    assert [o.name for o in session.outputs] == ["x2"]
    fed = np.random.default_rng(0).standard_normal((3, 8, 6, 6)).astype(np.float32)
    module = sys.modules["torch_student_maker"].module()
    with torch.no_grad():
        expected = module(torch.from_numpy(fed)).numpy()
    np.testing.assert_allclose(run(made.path, {"x": fed}), expected, atol=1e-5)
    with pytest.raises(ModelError, match="'x2' must be FLOAT"):
        make_student(teacher, "torch_student_maker:wrong", tmp_path / "w.onnx")
    assert not (tmp_path / "w.onnx").exists()


def test_an_exported_program_may_be_the_student(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    teacher = residual(tmp_path / "t.onnx")
    space: dict = {}
    exec(compile(TORCH_STUDENT, "student", "exec"), space)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(space["module"](), (torch.zeros(2, 8, 6, 6),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "given.pt2")
    made = make_student(teacher, str(tmp_path / "given.pt2"), tmp_path / "s.onnx")
    assert run(made.path, {"x": np.zeros((3, 8, 6, 6), np.float32)}).shape == (3, 8, 6, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_layers_of_exported_transformers_are_found_and_cut_exactly(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from featherweight import convert

    common = {"vocab_size": 50, "num_attention_heads": 4, "num_hidden_layers": 4, "hidden_size": 16}
    if name == "bert":
        config = transformers.BertConfig(**common, intermediate_size=32, max_position_embeddings=40)
        module = transformers.BertModel(config).eval()
    else:
        config = transformers.GPT2Config(**common, n_positions=40, bos_token_id=0, eos_token_id=0)
        module = transformers.GPT2Model(config).eval()
    module.save_pretrained(tmp_path / name, safe_serialization=True)
    convert.to_onnx(tmp_path / name, tmp_path / "t.onnx")
    made = make_student(tmp_path / "t.onnx", "layers=2", tmp_path / "s.onnx")
    layers = module.encoder.layer if name == "bert" else module.h
    kept = torch.nn.ModuleList([layers[0], layers[3]])
    if name == "bert":
        module.encoder.layer = kept
    else:
        module.h = kept
    session = ort.session(made.path)
    fed = {i.name: np.ones((2, 7), np.int64) for i in session.inputs}
    with torch.no_grad():
        expected = module(**{n: torch.from_numpy(x) for n, x in fed.items()}).last_hidden_state.numpy()
    np.testing.assert_allclose(session.run(fed)["last_hidden_state"], expected, atol=1e-5)

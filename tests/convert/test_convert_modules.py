"""PyTorch modules: outputs at several sizes, names, tied weights, what cannot be exported, what the pipeline finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from torch import nn  # noqa: E402

from featherweight.convert import to_onnx  # noqa: E402
from featherweight.errors import DataError, ModelError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.graph.normalise import normalise  # noqa: E402
from featherweight.graph.weights import weights  # noqa: E402
from featherweight.runtime import ort  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def settled(module: nn.Module) -> nn.Module:
    """BatchNorm statistics and affine values away from 0 and 1, so that a wrong fold shows."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image)
        return self.fc(self.drop(torch.relu(x + self.block(x)).mean((2, 3))))


class Recurrent(nn.Module):
    def __init__(self, kind: str = "LSTM"):
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.rnn: nn.RNNBase = getattr(nn, kind)(16, 12, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(24, 3)

    def forward(self, ids):
        return self.fc(self.rnn(self.emb(ids))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x, mask=None):
        return self.fc(self.encoder(x, src_key_padding_mask=mask).mean(1))


class Tied(nn.Module):
    """One table read as ids and as the last layer, as language models do; several outputs, an option, one unused."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, scale: float = 2.0, unused=None):
        hidden = self.table(ids) * scale
        return {"logits": self.head(hidden), "parts": [hidden, ids], "nothing": None}


def names(model: ir.Model) -> set[str]:
    return set(model.graph.initializers)


def shape(value: ir.Value) -> list[str]:
    return [str(d) for d in value.shape]


def test_a_residual_net(tmp_path):
    net = settled(Residual()).train()
    found = to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(1, 3, 12, 12))
    assert net.training, "the caller's module is put back"
    assert net.drop.training
    assert found.largest_difference < 1e-5
    assert [dict(s) for s in found.sizes] == [{"batch": 1}, {"batch": 3}]
    assert found.line.startswith("converted from Residual: largest difference")
    model = io.load(found.path)
    assert shape(model.graph.inputs[0]) == ["batch", "3", "12", "12"]
    assert model.graph.inputs[0].name == "image"
    assert (model.graph.outputs[0].name, shape(model.graph.outputs[0])) == ("output", ["batch", "5"])
    expected = {k for k, _ in net.named_parameters()} | {k for k, _ in net.named_buffers() if "num" not in k}
    assert expected <= names(model)
    assert {n.op_type for n in model.graph} & {"Dropout", "Identity"} == set()
    assert "block.3/Conv" in {n.name for n in model.graph}
    text = Path(found.path).read_bytes()
    assert __file__.encode() not in text, "no paths of whoever exported"

    plain = normalise(model, run=None).model
    assert "BatchNormalization" not in {n.op_type for n in plain.graph}
    assert {w.name for w in weights(plain)} == {"stem.0.weight", "block.0.weight", "block.3.weight", "fc.weight"}


def test_conversion_gives_the_same_bytes(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for name in ("a", "b"):
        to_onnx(net, tmp_path / name, example_inputs=torch.randn(2, 4))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_lstm_keeps_its_sequence_open(tmp_path):
    net = Recurrent()
    found = to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randint(0, 50, (2, 7)))
    assert [dict(s) for s in found.sizes] == [{"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 4}]
    model = io.load(found.path)
    assert shape(model.graph.inputs[0]) == ["batch", "sequence"]
    assert {"emb.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "fc.weight"} <= names(model)
    ids = torch.randint(0, 50, (5, 11))
    out = ort.session(found.path).run({"ids": ids.numpy()})["output"]
    assert np.allclose(out, net.eval()(ids).detach().numpy(), atol=1e-5)
    sites = {w.name for w in weights(normalise(model, run=None).model)}
    assert {"emb.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "fc.weight"} <= sites


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_other_recurrent_nets(kind, tmp_path):
    found = to_onnx(Recurrent(kind), tmp_path / "m.onnx", example_inputs=torch.randint(0, 50, (2, 7)))
    assert found.largest_difference < 1e-5
    if kind == "GRU":
        assert set(found.sizes[0]) == {"batch", "sequence"}
    else:  # the exporter has no RNN and writes out each step
        assert [n.text.partition(":")[0] for n in found.notes] == ["its sequence axis is fixed at 7"]


def test_an_encoder_whose_heads_are_found(tmp_path):
    from featherweight.graph.channels import analyse

    found = to_onnx(Encoder(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 7, 32))
    model = io.load(found.path)
    assert shape(model.graph.inputs[0]) == ["batch", "sequence", "32"]
    assert found.largest_difference < 1e-5
    plain = normalise(model, run=None).model
    assert "encoder.layers.0.linear1.weight" in {w.name for w in weights(plain)}
    units = sorted(len(g.units) for g in analyse(plain).groups)
    assert units == [4, 64], "4 heads and the hidden units"


@pytest.mark.slow
def test_an_encoder_with_a_mask(tmp_path):
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    found = to_onnx(Encoder(), tmp_path / "m.onnx", example_inputs=(torch.randn(2, 7, 32), mask))
    model = io.load(found.path)
    assert [v.name for v in model.graph.inputs] == ["x", "mask"]
    assert [shape(v) for v in model.graph.inputs] == [["batch", "sequence", "32"], ["batch", "sequence"]]


def test_tied_weights_stay_one_and_outputs_get_their_keys(tmp_path):
    ids = np.array([[1, 2, 3]])
    found = to_onnx(Tied(), tmp_path / "m.onnx", example_inputs={"ids": ids, "scale": 3.0, "unused": np.ones((1, 2))})
    model = io.load(found.path)
    assert [v.name for v in model.graph.inputs] == ["ids", "unused"]
    assert [v.name for v in model.graph.outputs] == ["logits", "parts_0", "parts_1"]
    large = [v for v in model.graph.initializers.values() if v.const_value.size == 160]
    assert [v.name for v in large] == ["table.weight"]
    out = ort.session(found.path).run({"ids": ids, "unused": np.ones((1, 2))})
    assert np.array_equal(out["parts_1"], ids)


def test_axes_by_request(tmp_path):
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    dynamic = {"input": {0: "rows", 2: "time"}}
    found = to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(1, 2, 16), dynamic=dynamic)
    assert shape(io.load(found.path).graph.inputs[0]) == ["rows", "2", "time"]
    fixed = to_onnx(net, tmp_path / "f.onnx", example_inputs=torch.randn(1, 2, 16), dynamic=False)
    assert shape(io.load(fixed.path).graph.inputs[0]) == ["1", "2", "16"]
    with pytest.raises(DataError, match="inputs are input"):
        to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(1, 2, 16), dynamic={"image": [0]})
    with pytest.raises(DataError, match="axes 0 to 2"):
        to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(1, 2, 16), dynamic={"input": [3]})


class Fixed(nn.Module):
    def forward(self, x):
        return x * torch.ones(x.shape[0]).sum() + torch.zeros(int(x.shape[0]), 4)[:, :1] + torch.eye(2)[:, :1]


def test_an_axis_that_is_a_number_closes_and_is_told(tmp_path):
    found = to_onnx(Fixed(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))
    assert [n.text for n in found.notes] == ["its batch axis is fixed at 2: Fixed computes with the size as a number"]
    assert shape(io.load(found.path).graph.inputs[0]) == ["2", "4"]
    with pytest.raises(ModelError, match=r"axis 0 \(rows\) of the input 'x' cannot stay open"):
        to_onnx(Fixed(), tmp_path / "n.onnx", example_inputs=torch.randn(2, 4), dynamic={"x": {0: "rows"}})


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


class Leaves(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2)


class Random(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, training=True)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


class Words(nn.Module):
    def forward(self, x):
        return {"y": x * 2, "kind": "cat"}


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Branches(), r"depends on the values of tensors \(test_convert_modules.py, line \d+: if x.sum\(\) > 0:\)"),
        (Unknown(), r"no ONNX form of the operator aten\._linalg_svd"),
        (Leaves(), "leaves PyTorch"),
        (Counts(), "changes its buffer 'calls'"),
        (Words(), "'kind' is a str"),
        (Random(), r"trains even in eval mode \(aten.dropout.default\)"),
        (Noise(), "changes from call to call"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_cannot_be_exported_says_why(module, says, tmp_path, capfd):
    with pytest.raises(ModelError, match=says) as refused:
        to_onnx(module, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))
    assert len(str(refused.value)) < 400
    if isinstance(module, Counts):
        assert module.calls == 0, "put back"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        (None, "needs an example of its inputs"),
        (torch.randn(2, 3), "does not run on its example inputs"),
        ((torch.randn(2, 4),) * 3, "does not take these example inputs"),
        ({"x": torch.randn(2, 4)}, "does not take these example inputs"),
        (torch.zeros(0, 4), "empty"),
        ("image", "must be tensors"),
        ((1, 2), "does not take|at least one tensor"),
    ],
)
def test_examples_that_do_not_fit(examples, says, tmp_path):
    with pytest.raises(DataError, match=says):
        to_onnx(nn.Linear(4, 2), tmp_path / "m.onnx", example_inputs=examples)


def test_a_wrong_file_is_caught(tmp_path, monkeypatch):
    from featherweight.convert import tidy

    def spoil(model: ir.Model, axes: object) -> None:
        original(model, axes)
        value = model.graph.initializers["bias"]
        value.const_value = ir.tensor(value.const_value.numpy() + 1, name="bias")

    original = tidy.name_axes
    monkeypatch.setattr(tidy, "name_axes", spoil)
    with pytest.raises(ModelError, match=r"output 'output' of the ONNX model differs from Linear by 1 at batch 1"):
        to_onnx(nn.Linear(4, 2), tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_computed_in_float32(dtype, tmp_path):
    net = nn.Linear(4, 2).to(dtype)
    found = to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4, dtype=dtype))
    assert next(net.parameters()).dtype == dtype
    assert io.load(found.path).graph.initializers["weight"].dtype == ir.DataType.FLOAT
    assert "float32" in found.notes[0].text


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path):
    net = nn.Sequential(nn.Linear(16384, 16384, bias=False), nn.Linear(16384, 16384, bias=False), nn.Linear(16384, 2))
    found = to_onnx(net, tmp_path / "m.onnx", example_inputs=torch.randn(1, 16384))
    assert (tmp_path / "m.onnx").stat().st_size < 1_000_000
    assert (tmp_path / "m.onnx.data").stat().st_size > 2_147_483_647
    assert found.largest_difference < 1e-3

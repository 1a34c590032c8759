"""The channel view of a model, and how it reads."""

from __future__ import annotations

import io as text_io
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from click.testing import CliRunner
from onnx import numpy_helper
from rich.console import Console

from featherweight.channel_view import channel_view
from featherweight.cli import group
from featherweight.report.channels import channel_parts, reasons

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3, 8, 8] x) => (float[N, 2] y) {
  [stem] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1)
  [dw] b = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 6>(a, w2)
  [gap] c = GlobalAveragePool(b)
  [flat] d = Flatten(c)
  [head] y = Gemm<transB = 1>(d, w3)
}"""


def saved(folder: Path) -> Path:
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (6, 3, 3, 3), "w2": (6, 1, 3, 3), "w3": (2, 6)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_groups_with_what_hangs_on_them(tmp_path):
    view = channel_view(saved(tmp_path))
    (line,) = view.groups
    assert (line.name, line.units, line.width) == ("channels of stem", 6, 1)
    assert (line.makers, line.readers) == (("stem", "dw"), ("head",))
    assert line.weight_bytes == 4 * (6 * 27 + 6 * 9 + 2 * 6)
    assert line.macs == 64 * 6 * 27 + 64 * 6 * 9 + 12
    assert reasons(view) == ["head: its 2 channels stay: y: is an output of the model"]


def test_the_table_and_its_json_say_the_same(tmp_path):
    path = saved(tmp_path)
    console = Console(file=text_io.StringIO(), width=100)
    for part in channel_parts(channel_view(path)):
        console.print(part)
    shown = console.file.getvalue()
    assert "1 groups of removable channels" in shown
    assert "stem" in shown
    result = CliRunner().invoke(group, ["inspect", str(path), "--channels", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["kind"] == "channels"
    assert found["groups"][0]["units"] == 6
    assert found["frozen"] == [{"where": "head", "text": "its 2 channels stay: y: is an output of the model"}]

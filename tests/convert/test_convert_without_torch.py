"""Without torch, onnxscript, transformers and safetensors all else works, and what needs them says how to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
ABSENT = {'torch', 'onnxscript', 'transformers', 'safetensors'}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ABSENT:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
"""


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_modules_but_those_of_torch_are_imported(tmp_path):
    out = run(
        """
import importlib, pkgutil, featherweight
lazy = ('featherweight.learn.', 'featherweight.convert.')
absent = []
for info in pkgutil.walk_packages(featherweight.__path__, 'featherweight.'):
    try:
        importlib.import_module(info.name)
    except ModuleNotFoundError as e:
        assert e.name.partition('.')[0] in ABSENT and info.name.startswith(lazy), (info.name, e)
for name in featherweight.__all__:
    try:
        getattr(featherweight, name)
    except featherweight.MissingExtraError:
        pass
print('torch' in sys.modules)
""",
        tmp_path,
    )
    assert out == "False\n"


SAYS = """
import featherweight as fw
def says(what, *parts):
    try:
        what()
    except fw.MissingExtraError as e:
        assert all(p in str(e) for p in ('featherweight[' + parts[0] + ']', 'install', *parts[1:])), str(e)
        return
    raise AssertionError('no MissingExtraError')
"""


def test_programs_and_folders_say_which_extra(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    run(
        SAYS
        + """
says(lambda: fw.compress('model.pt2', {}, out='run'), 'torch', 'torch')
says(lambda: fw.compress('bert', {}, out='run'), 'huggingface', 'transformers')
from pathlib import Path
assert not Path('run').exists()
""",
        tmp_path,
    )


def test_distill_says_which_extra(tmp_path):
    pytest.importorskip("torch")
    code = SAYS + "says(lambda: fw.distill('a.onnx', 'b.onnx', {}, out='run'), 'learn')"
    run(code, tmp_path)


def test_a_model_is_compressed_and_shown(tmp_path):
    out = run(
        """
import numpy as np, onnx, featherweight as fw
from onnx import TensorProto, helper, numpy_helper
rng = np.random.default_rng(0)
w = rng.standard_normal((64, 32)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node('MatMul', ['x', 'w'], ['y'])], 'g',
    [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['batch', 64])],
    [helper.make_tensor_value_info('y', TensorProto.FLOAT, ['batch', 32])], [numpy_helper.from_array(w, 'w')])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10), 'm.onnx')
data = {'x': rng.standard_normal((200, 64)).astype(np.float32)}
report = fw.compress('m.onnx', data, max_size='70%', max_candidates=2, out='run')
print(report.outcome, fw.inspect('run/model.onnx').parameters > 0)
""",
        tmp_path,
    )
    assert out == "met True\n"

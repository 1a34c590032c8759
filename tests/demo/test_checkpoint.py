"""A checkpoint is read without PyTorch, and nothing in it is executed."""

from __future__ import annotations

import io
import pickle  # hostile files are made here, never read
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from featherweight.demo.checkpoint import read_checkpoint
from featherweight.errors import ModelError

W = np.arange(6, dtype=np.float32)


class _Global:
    """Pickles as the bare name `module.name`, without importing it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Storage:
    def __init__(self, kind: str, key: str, numel: int) -> None:
        self.kind, self.key, self.numel = kind, key, numel


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.args = (storage, offset, shape, strides, False, OrderedDict())


class _Pickler(pickle._Pickler):  # the Python one, whose save can be extended
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            return ("storage", _Global("torch", obj.kind), obj.key, "cpu", obj.numel)
        return None

    def save(self, obj: object, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Tensor):
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.args)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def _pickled(obj: object) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(obj)
    return out.getvalue()


def _archive(path: Path, state: object, data: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", _pickled(state))
        for key, raw in data.items():
            z.writestr(f"archive/data/{key}", raw)
    return path


def _stream(path: Path, state: object, data: dict[str, bytes], *, magic: int = 0x1950A86A20F9469CFC6C) -> Path:
    parts = [_pickled(x) for x in (magic, 1001, {"little_endian": True}, state, list(data))]
    parts += [struct.pack("<q", len(raw) // 4) + raw for raw in data.values()]
    path.write_bytes(b"".join(parts))
    return path


@pytest.fixture(params=[_archive, _stream], ids=["zip", "stream"])
def write(request: pytest.FixtureRequest):
    return request.param


def test_views_of_a_shared_storage_are_read(write, tmp_path: Path) -> None:
    s = _Storage("FloatStorage", "7", 6)
    state = OrderedDict(
        a=_Tensor(s, 0, (2, 3), (3, 1)), transposed=_Tensor(s, 0, (3, 2), (1, 3)), last=_Tensor(s, 5, (), ())
    )
    got = read_checkpoint(write(tmp_path / "w.pth", state, {"7": W.tobytes()}))
    assert list(got) == ["a", "transposed", "last"]
    np.testing.assert_array_equal(got["a"], W.reshape(2, 3))
    np.testing.assert_array_equal(got["transposed"], W.reshape(2, 3).T)
    assert got["last"].shape == ()
    assert got["last"] == 5


def test_a_state_dict_beside_an_optimisers_is_read_by_its_key(write, tmp_path: Path) -> None:
    s, moments = _Storage("FloatStorage", "7", 6), _Storage("FloatStorage", "8", 6)
    optimiser = {"state": {0: {"exp_avg": _Tensor(moments, 0, (6,), (1,)), "step": 3}}}
    state = {"step": 3, "model": OrderedDict(a=_Tensor(s, 0, (2, 3), (3, 1))), "optimiser": optimiser}
    path = write(tmp_path / "w.pth", state, {"7": W.tobytes(), "8": W.tobytes()})
    got = read_checkpoint(path, entry="model")
    assert list(got) == ["a"]
    np.testing.assert_array_equal(got["a"], W.reshape(2, 3))
    with pytest.raises(ModelError, match="'weights'"):
        read_checkpoint(path, entry="weights")


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.nn", "Linear")]
)
def test_a_name_outside_the_allow_list_is_refused_and_not_run(write, tmp_path: Path, module: str, name: str) -> None:
    with pytest.raises(ModelError, match=rf"names {module}\.{name}, .*nothing was run"):
        read_checkpoint(write(tmp_path / "w.pth", OrderedDict(a=_Global(module, name)), {}))


def test_a_call_of_a_shell_command_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    body = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", body)
    with pytest.raises(ModelError, match=r"names os\.system"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (7,), (1,)), (5, (2,), (1,)), (0, (2, 3), (4, 1)), (0, (2,), (-1,)), (-1, (1,), (1,))],
)
def test_a_tensor_outside_its_storage_is_refused(
    write, tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    state = OrderedDict(a=_Tensor(_Storage("FloatStorage", "7", 6), offset, shape, strides))
    with pytest.raises(ModelError, match="tensor 'a'"):
        read_checkpoint(write(tmp_path / "w.pth", state, {"7": W.tobytes()}))


def test_truncated_files_are_refused(write, tmp_path: Path) -> None:
    state = OrderedDict(a=_Tensor(_Storage("FloatStorage", "7", 6), 0, (6,), (1,)))
    path = write(tmp_path / "w.pth", state, {"7": W.tobytes()})
    whole = path.read_bytes()
    for keep in range(0, len(whole), 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError):
            read_checkpoint(path)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = _stream(tmp_path / "w.pth", OrderedDict(), {}, magic=5)
    with pytest.raises(ModelError, match=r"w\.pth is not a readable PyTorch checkpoint.*magic"):
        read_checkpoint(path)
    with pytest.raises(ModelError, match="one flat dictionary of tensors"):
        read_checkpoint(_stream(tmp_path / "n.pth", OrderedDict(epoch=3), {}))

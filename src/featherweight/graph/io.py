"""Read, check and write ONNX models. Nothing here runs a model or changes its meaning.

Weights kept beside the file stay memory-mapped, so a model larger than memory can be loaded, edited and
saved again. Every write goes to a temporary file in the target folder and is renamed when complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from featherweight.errors import ModelError, OutputError
from featherweight.graph import sparse, surgery, validate
from featherweight.graph.surgery import copy_model, in_memory, read_protobuf, read_small

MAX_PROTO_BYTES = 2**31 - 1
EXTERNAL_ABOVE_BYTES = 1_500_000_000
"""Weights of more bytes than this go to a side file when the caller does not say."""
INLINE_BELOW_BYTES = 1024
"""Tensors this small stay in the model file even then: shape inference reads them."""
_PAGE_BYTES = 4096
_CHUNK_BYTES = 1 << 24


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file; external weights are memory-mapped, never read.

    Raises ModelError when the file is missing, is not ONNX, is truncated, contradicts itself, is too new or
    too old, or when its external data is absent, too short or outside the model's folder.
    """
    where = Path(path)
    validate.check_is_onnx_file(where)
    proto = _parse(where)
    validate.check_proto(proto, where)
    sparse.densify(proto, where)
    base = validate.resolve_external(proto, where)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError, AttributeError) as e:
        raise ModelError(f"{where} is not a valid ONNX model: {_first_line(e)}; export it again") from e
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = base
    validate.check_links(model, where)
    read_protobuf(model)
    read_small(model)
    return model


def save(model: ir.Model, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Write `model` to `path`, completely or not at all; the model itself is not changed.

    `external` puts the weights into `<file name>.data` beside it; None decides by size. The same model gives the
    same bytes. Raises OutputError when the target cannot be written (folder missing, not permitted, disk full);
    then nothing is left behind and an existing file is untouched.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"the output must be a file, but {target} is a folder; give a name such as model.onnx")
    if external is None:
        external = sum(t.nbytes for t in _tensors(model)) > EXTERNAL_ABOVE_BYTES
    copy = copy_model(model)
    data_name = target.name + ".data"
    temporary: list[Path] = []
    try:
        _bring_inside(copy, keep_large=external)
        if external:
            temporary.append(_write_side_file(copy, target.parent, data_name))
        payload = _serialise(copy)
        temporary.append(_temporary_file(target.parent, target.name))
        with open(temporary[-1], "wb") as f:
            _write(f, memoryview(payload))
            _sync(f)
        if external:
            os.replace(temporary[0], target.parent / data_name)
        os.replace(temporary[-1], target)
    except OSError as e:
        raise OutputError(_why_not_written(target, e)) from e
    finally:
        for file in temporary:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()


def to_bytes(model: ir.Model) -> bytes:
    """The model as one ONNX protobuf, weights inside; equal models give equal bytes.

    Raises ModelError above 2 GiB, where the format ends; `save` then uses a side file.
    """
    copy = copy_model(model)
    _bring_inside(copy, keep_large=False)
    return _serialise(copy)


def size_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes on disk of the model file and of every side file its tensors point to."""
    return sum(file.stat().st_size for file in files(path))


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of the model file followed by its side files in order of name."""
    digest = hashlib.sha256()
    for file in files(path):
        with open(file, "rb") as f:
            while chunk := f.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def files(path: str | os.PathLike[str]) -> list[Path]:
    """The model file, then its side files in order of name; all checked as in `load`."""
    where = Path(path)
    validate.check_is_onnx_file(where)
    proto = _parse(where)
    found = {validate.external_entry(t, "location") or "" for t in validate.tensors(proto) if validate.is_external(t)}
    validate.resolve_external(proto, where)
    return [where, *(where.parent / name for name in sorted(found))]


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of the model, each tensor object counted once."""
    return sum(t.nbytes for t in {id(t): t for t in _tensors(model)}.values())


def _parse(where: Path) -> onnx.ModelProto:
    """Parse the protobuf; its depth is limited to 100 messages by the parser."""
    proto = onnx.ModelProto()
    try:
        size = where.stat().st_size
        if size > MAX_PROTO_BYTES:
            raise ModelError(
                f"an ONNX file must be below 2 GiB, but {where} has {size} B; save its weights as external data"
            )
        proto.ParseFromString(where.read_bytes())
    except OSError as e:
        raise ModelError(f"{where} cannot be read: {e.strerror or e}") from e
    except DecodeError as e:
        raise ModelError(
            f"{where} is not a readable ONNX file: it is truncated or corrupt, or its sub-graphs are nested deeper "
            "than the format's parsers allow (100 messages); download or export it again"
        ) from e
    return proto


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor of every graph and function: initializers, then attributes."""
    for graph in [*model.graphs(), *(f.graph for f in model.functions.values())]:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attr in node.attributes.values():
                if attr.is_ref():
                    continue
                if attr.type == ir.AttributeType.TENSOR:
                    yield attr.as_tensor()
                elif attr.type == ir.AttributeType.TENSORS:
                    yield from attr.as_tensors()


def _bring_inside(model: ir.Model, *, keep_large: bool) -> None:
    """Replace tensors that point to files; with `keep_large`, initializers that go to the side file stay."""
    for graph in [*model.graphs(), *(f.graph for f in model.functions.values())]:
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not (keep_large and _goes_outside(tensor)):
                value.const_value = in_memory(tensor)
        for node in graph:
            for name, attr in list(node.attributes.items()):
                if attr.is_ref() or attr.type != ir.AttributeType.TENSOR:
                    continue
                if isinstance(attr.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, in_memory(attr.value))


def _goes_outside(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= INLINE_BELOW_BYTES


def _write_side_file(model: ir.Model, folder: Path, data_name: str) -> Path:
    """Write all large initializers to a temporary file and point them to `data_name`. Returns the file."""
    file = _temporary_file(folder, data_name)
    try:
        placed: dict[int, tuple[int, ir.TensorProtocol]] = {}
        with open(file, "wb") as f:
            for graph in model.graphs():
                for value in graph.initializers.values():
                    tensor = value.const_value
                    if tensor is None or not _goes_outside(tensor):
                        continue
                    if id(tensor) not in placed:
                        if tensor.nbytes >= 1 << 20:
                            f.write(b"\0" * (-f.tell() % _PAGE_BYTES))
                        placed[id(tensor)] = (f.tell(), tensor)
                        _write(f, _raw(tensor))
                    value.const_value = ir.ExternalTensor(
                        data_name, placed[id(tensor)][0], tensor.nbytes, tensor.dtype,
                        shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir="",
                    )  # fmt: skip
            _sync(f)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def _raw(tensor: ir.TensorProtocol) -> memoryview:
    """Little-endian bytes of a tensor, without a copy where the layout allows it."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    array = in_memory(tensor).numpy()
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat)


def _serialise(model: ir.Model) -> bytes:
    nbytes = stored_bytes(model)
    outside = sum(t.nbytes for t in _tensors(model) if isinstance(t, ir.ExternalTensor))
    if nbytes - outside > MAX_PROTO_BYTES:
        raise ModelError(
            f"a single ONNX file must be below 2 GiB, but the weights have {nbytes} B; save with external data"
        )
    proto = surgery.to_proto(model)
    repeated = _repeated_info(model)
    for graph in validate.graphs(proto.graph):
        kept = [v for v in graph.value_info if v.name not in repeated or v.metadata_props]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    try:
        payload: bytes = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as e:
        raise ModelError(f"the model cannot be serialised: {_first_line(e)}; save with external data") from e
    return payload


def _repeated_info(model: ir.Model) -> set[str]:
    """Tensors whose recorded type and shape every reader knows anyway: stored ones, and results of standard operators.

    The result of a constant expression keeps its record: it says what shape an encoded weight has.
    """
    known: dict[ir.Value, bool] = {}
    repeated: set[str] = set()
    for graph in model.graphs():
        repeated.update(graph.initializers)
        for node in graph:
            if node.domain in ("", "ai.onnx"):
                repeated.update(o.name for o in node.outputs if o.name and not surgery.is_constant(o, known))
    return repeated


def _temporary_file(folder: Path, name: str) -> Path:
    handle, file = tempfile.mkstemp(prefix=f".{name}.", suffix=".partial", dir=folder)
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(file, 0o666 & ~umask)
    return Path(file)


def _write(f: IO[bytes], data: memoryview) -> None:
    for start in range(0, len(data), _CHUNK_BYTES):
        f.write(data[start : start + _CHUNK_BYTES])


def _sync(f: IO[bytes]) -> None:
    """Reach the disk before the rename, else a crash could leave an empty file under the final name."""
    f.flush()
    os.fsync(f.fileno())


def _why_not_written(target: Path, error: OSError) -> str:
    reason = {
        errno.ENOSPC: "the disk is full; free some space or write elsewhere",
        errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
        errno.EFBIG: "the file would exceed the allowed file size; raise the limit or write elsewhere",
        errno.ENOENT: f"the folder {target.parent} does not exist; create it first",
        errno.ENOTDIR: f"{target.parent} is not a folder; choose another path",
        errno.EACCES: "permission denied; choose another folder",
        errno.EPERM: "permission denied; choose another folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENAMETOOLONG: "the file name is too long; choose a shorter one",
    }.get(error.errno or 0, str(error))
    return f"{target} cannot be written: {reason}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""Checks on model files from strangers, made before anything is allocated by what the file claims.

Law: a tensor's declared shape must agree with the bytes that are really there, external data must lie in the
model's own folder, and nothing the file says may make us read or write elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from featherweight.errors import ModelError

MIN_OPSET = 7
_EXPORT = "export the model to ONNX and give that file"


def check_is_onnx_file(where: Path) -> None:
    """Raise ModelError if `where` is absent, a folder, empty, or recognisably another format."""
    if where.is_dir():
        raise ModelError(f"{where} must be an ONNX file, but it is a folder; {_folder_hint(where)}")
    if not where.exists():
        raise ModelError(f"{where} does not exist; check the path")
    if not where.is_file():
        raise ModelError(f"{where} must be a regular file; copy the model to one")
    try:
        with open(where, "rb") as f:
            head = f.read(64)
    except OSError as e:
        raise ModelError(f"{where} cannot be read: {e.strerror or e}") from e
    if not head:
        raise ModelError(f"{where} must be an ONNX file, but it is empty (0 bytes); download or export it again")
    other = _other_format(head, where.suffix.lower())
    if other:
        raise ModelError(f"{where} must be an ONNX file, but it {other}")


def _folder_hint(where: Path) -> str:
    inside = sorted(p.name for p in where.glob("*.onnx"))
    if inside:
        return f"give {inside[0]} inside it"
    if (where / "saved_model.pb").exists():
        return f"it is a TensorFlow SavedModel: {_EXPORT} (tf2onnx)"
    if (where / "config.json").exists():
        return f"it looks like a Hugging Face folder: {_EXPORT}"
    return "it holds no .onnx file"


def _other_format(head: bytes, suffix: str) -> str:
    """What else the file is, with the way out; '' if it may be ONNX."""
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself; run `git lfs pull`"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page (an error page saved as a file?); download it again"
    if head.startswith(b"\x89HDF"):
        return f"is an HDF5 (Keras) file; {_EXPORT} (tf2onnx or keras' model.export)"
    if head.startswith(b"PK\x03\x04"):
        if suffix == ".keras":
            return f"is a Keras archive; {_EXPORT} (tf2onnx or keras' model.export)"
        if suffix in (".pt", ".pth", ".pt2", ".bin", ".ckpt"):
            return f"is a PyTorch file; {_EXPORT} (torch.onnx.export)"
        return "is a zip archive; unpack it first (if it is a PyTorch file, export it with torch.onnx.export)"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"is a Python pickle (an old PyTorch file?), which is never opened; {_EXPORT} (torch.onnx.export)"
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite file; {_EXPORT} (from the original model with tf2onnx)"
    if head[4:8] == b"ORTM":
        return "is an ONNX Runtime .ort file; give the .onnx file it was made from"
    if head.startswith(b"GGUF"):
        return f"is a GGUF file; {_EXPORT} from the original model"
    if head[8:10] in (b'{"', b"{ ") and head[5:8] == b"\0\0\0":
        return f"is a safetensors file: weights without a graph; {_EXPORT}"
    if head.lstrip()[:1] in (b"{", b"["):
        return f"is JSON text; {_EXPORT}"
    if head.lstrip()[:5] == b"<?xml":
        return f"is XML (OpenVINO?); {_EXPORT}"
    return ""


def check_proto(proto: onnx.ModelProto, where: Path) -> None:
    """Raise ModelError if versions, opsets or tensors are contradictory or unknown."""
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{where} must hold an ONNX graph, but it has none; it is not ONNX, or it is corrupt")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where}: the IR version must be <= {onnx.IR_VERSION}, but got {proto.ir_version}; "
            "install a newer onnx and onnxruntime, or export with an older one"
        )
    _check_text(proto, where)
    _check_opsets(proto, where)
    _check_attributes(proto, where)
    for tensor in tensors(proto):
        check_tensor(tensor, where)


def _check_text(proto: onnx.ModelProto, where: Path) -> None:
    """Names must be text: the parser hands over bytes where they are not UTF-8."""
    names: list[object] = [i.domain for i in proto.opset_import]
    for function in proto.functions:
        names += [function.name, function.domain, *function.input, *function.output, *function.attribute]
    for node in _all_nodes(proto):
        names += [node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute)]
    for graph in graphs(proto.graph):
        values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        names += [graph.name, *(v.name for v in values)]
    names += [e.value for t in tensors(proto) for e in t.external_data]
    texts = (a.s for n in _all_nodes(proto) if n.op_type != "Constant" for a in n.attribute if a.type == a.STRING)
    names += [s if s != s.decode(errors="replace").encode() else "" for s in texts]
    bad = next((n for n in names if not isinstance(n, str)), None)
    if bad is not None:
        raise ModelError(f"{where} is corrupt: a name must be UTF-8 text, but one is {bad!r}; download it again")


_ATTRIBUTE_TYPES = {
    getattr(onnx.defs.OpSchema.AttrType, name): int(number)
    for name, number in onnx.AttributeProto.AttributeType.items()
    if name != "UNDEFINED"
}
"""The number a file gives to each type that an operator can declare."""


def _check_attributes(proto: onnx.ModelProto, where: Path) -> None:
    """Attributes must have the type that their operator declares, and hold what their type says."""
    version = next((i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")), MIN_OPSET)
    for node in _all_nodes(proto):
        declared: Mapping[str, onnx.defs.OpSchema.Attribute] = {}
        if node.domain in ("", "ai.onnx") and onnx.defs.has(node.op_type):
            with contextlib.suppress(onnx.defs.SchemaError):
                declared = onnx.defs.get_schema(node.op_type, version, "").attributes
        for attr in node.attribute:
            if attr.ref_attr_name:
                continue
            wanted = _ATTRIBUTE_TYPES[declared[attr.name].type] if attr.name in declared else int(attr.type)
            empty = (attr.type == onnx.AttributeProto.TENSOR and not attr.HasField("t")) or (
                attr.type == onnx.AttributeProto.GRAPH and not attr.HasField("g")
            )
            if attr.type == 0 or attr.type != wanted or empty:
                kind = onnx.AttributeProto.AttributeType.Name(attr.type) if 0 <= attr.type <= 14 else str(attr.type)
                raise ModelError(
                    f"{where}: attribute {attr.name!r} of node {node.name or node.op_type!r} must hold what its "
                    f"operator declares, but it is {'an empty ' if empty else 'a '}{kind}; export it again"
                )


def _all_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, in sub-graphs and functions too."""
    todo = [graph.node for graph in graphs(proto.graph)]
    for function in proto.functions:
        todo.append(function.node)
        for node in function.node:
            for attr in node.attribute:
                for sub in ([attr.g] if attr.HasField("g") else []) + list(attr.graphs):
                    todo.extend(graph.node for graph in graphs(sub))
    for nodes in todo:
        yield from nodes


def _check_opsets(proto: onnx.ModelProto, where: Path) -> None:
    seen: dict[str, int] = {}
    for entry in proto.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if seen.setdefault(domain, entry.version) != entry.version:
            raise ModelError(
                f"{where}: one opset version per domain is allowed, but {entry.domain or 'ai.onnx'!r} is imported "
                f"as {seen[domain]} and {entry.version}; export it again"
            )
    newest = onnx.defs.onnx_opset_version()
    version = seen.get("")
    if version is None:
        if proto.opset_import and not any(n.domain in ("", "ai.onnx") for n in proto.graph.node):
            return
        version = 1
    if not MIN_OPSET <= version <= newest:
        hint = (
            "export it again with a newer opset (the runtime does not guarantee older ones)"
            if version < MIN_OPSET
            else "install a newer onnx and onnxruntime, or export with an older opset"
        )
        raise ModelError(f"{where}: the opset must be {MIN_OPSET}..{newest}, but got {version}; {hint}")


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and every sub-graph in it."""
    todo = [graph]
    while todo:
        current = todo.pop()
        yield current
        for node in current.node:
            for attr in node.attribute:
                if attr.HasField("g"):
                    todo.append(attr.g)
                todo.extend(attr.graphs)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of the file: initializers and attributes, sub-graphs and functions included."""
    for graph in graphs(proto.graph):
        yield from graph.initializer
    for node in _all_nodes(proto):
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors


def is_external(tensor: onnx.TensorProto) -> bool:
    """True if the tensor's bytes lie in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_entry(tensor: onnx.TensorProto, key: str) -> str | None:
    """One external-data field (location, offset, length), None if absent."""
    return next((e.value for e in tensor.external_data if e.key == key), None)


def check_tensor(tensor: onnx.TensorProto, where: Path) -> None:
    """Raise ModelError unless type and shape are known and agree with the bytes stored in the file."""
    name = tensor.name or "(unnamed)"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where}: tensor {name!r} has the unknown data type {tensor.data_type}; export it again")
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{where}: tensor {name!r} must have sizes >= 0, but got {list(tensor.dims)}; it is corrupt")
    if tensor.HasField("segment"):
        raise ModelError(f"{where}: tensor {name!r} is stored in segments, which no runtime reads; export it again")
    if is_external(tensor):
        return
    n = 1
    for d in tensor.dims:
        n *= d
    if dtype == ir.DataType.STRING:
        expected, found, unit = n, len(tensor.string_data), "strings"
    elif tensor.HasField("raw_data"):
        expected, found, unit = -(-n * dtype.bitwidth // 8), len(tensor.raw_data), "bytes"
    else:
        expected, found, unit = _typed_count(dtype, n), _typed_found(tensor), "values"
    if expected != found:
        raise ModelError(
            f"{where}: tensor {name!r} of shape {list(tensor.dims)} and type {dtype.name} must hold {expected} {unit}, "
            f"but the file has {found}; it is truncated or corrupt, so download or export it again"
        )


def _typed_count(dtype: ir.DataType, n: int) -> int:
    if dtype.bitwidth in (2, 4):
        return -(-n * dtype.bitwidth // 8)
    return 2 * n if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else n


def _typed_found(tensor: onnx.TensorProto) -> int:
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return sum(len(f) for f in fields)


def resolve_external(proto: onnx.ModelProto, where: Path) -> str:
    """Check every external reference; returns the folder that holds them.

    Only files in the model's folder (or, if the model is itself a link, in the folder it really lies in) are read.
    Raises ModelError for absolute paths, '..', links that lead out, missing or short files.
    """
    shown = where.parent
    real = Path(os.path.realpath(where)).parent
    allowed = [Path(os.path.realpath(shown)), real]
    base = str(shown) if str(shown) else "."
    for tensor in tensors(proto):
        if not is_external(tensor):
            continue
        location = external_entry(tensor, "location")
        file = _external_file(tensor.name, location, where, allowed)
        _check_range(tensor, file, where)
        if Path(os.path.realpath(shown)) not in file.parents:
            # The model is a link into a store of blobs: name the data by where it really lies.
            base = str(real)
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = os.path.relpath(file, real)
    return base


def _external_file(name: str, location: str | None, where: Path, allowed: list[Path]) -> Path:
    law = f"{where}: the external data of tensor {name!r} must lie in the model's folder"
    if not location:
        raise ModelError(f"{law}, but no file is named; export it again")
    if "\0" in location or os.path.isabs(location) or location[:1] in ("/", "\\") or location[1:2] == ":":
        raise ModelError(f"{law}, but the path {location!r} is absolute; save the model and its data side by side")
    if ".." in Path(location.replace("\\", "/")).parts:
        raise ModelError(f"{law}, but {location!r} leads out of it; save the model and its data side by side")
    try:
        file = Path(os.path.realpath(where.parent / location, strict=True))
    except FileNotFoundError as e:
        raise ModelError(
            f"{where}: the file {location!r} with the weights (tensor {name!r}) is missing from {where.parent}; "
            "copy it there, it belongs to the model"
        ) from e
    except (OSError, ValueError) as e:
        raise ModelError(f"{where}: the external data file {location!r} cannot be read: {e}") from e
    if not any(folder in file.parents for folder in allowed):
        raise ModelError(f"{law}, but {location!r} is a link to {file}; copy the data file beside the model")
    if not file.is_file():
        raise ModelError(f"{law}, but {location!r} is not a regular file")
    if file.stat().st_nlink > 1:
        raise ModelError(f"{law}, but {location!r} has several hard links, which may expose another file; copy it")
    return file


def _check_range(tensor: onnx.TensorProto, file: Path, where: Path) -> None:
    dtype = ir.DataType(tensor.data_type)
    if dtype == ir.DataType.STRING:
        raise ModelError(f"{where}: tensor {tensor.name!r} holds strings, which cannot be external; export it again")
    n = 1
    for d in tensor.dims:
        n *= d
    expected = -(-n * dtype.bitwidth // 8)
    try:
        offset = int(external_entry(tensor, "offset") or 0)
        length = int(external_entry(tensor, "length") or expected)
    except ValueError as e:
        raise ModelError(f"{where}: offset and length of tensor {tensor.name!r} must be whole numbers; {e}") from e
    size = file.stat().st_size
    if length != expected:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} of shape {list(tensor.dims)} and type {dtype.name} needs {expected} B, "
            f"but its external length is {length} B; the file is corrupt"
        )
    if offset < 0 or offset + length > size:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} needs bytes {offset}..{offset + length} of {file.name!r}, but that file "
            f"has {size} B; it is truncated or belongs to another model"
        )


def check_links(model: ir.Model, where: Path) -> None:
    """Raise ModelError if a node or output reads a tensor that nothing makes."""
    for graph in model.graphs():
        values = [(f"node {n.name or n.op_type!r}", v) for n in graph for v in n.inputs if v is not None]
        values += [("the graph output", v) for v in graph.outputs]
        for reader, value in values:
            if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
                raise ModelError(
                    f"{where}: {reader} reads {value.name!r}, which no node, input or initializer makes; "
                    "the model is incomplete, so export it again"
                )

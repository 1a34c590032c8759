"""Tensors and messages of the Open Inference Protocol, version 2, as both ends of a connection read and write them.

A message is JSON, or JSON followed by raw tensors (the binary tensor data extension): the header
`Inference-Header-Content-Length` then tells where the JSON ends. Bytes are little-endian, row by row; a BYTES
element has its length as four bytes in front. Whatever comes from the other end is checked before memory is taken.
Source: https://github.com/kserve/open-inference-protocol, extensions:
https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from __future__ import annotations

import itertools
import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import FeatherweightError

Array = npt.NDArray[Any]

LENGTH_HEADER = "Inference-Header-Content-Length"
BINARY_EXTENSION = "binary_tensor_data"
MAX_RANK = 16
NUMPY_OF = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BYTES": "object",
}  # fmt: skip
"""numpy's name of each datatype. BF16 is missing: neither numpy nor ONNX Runtime's Python door has it."""
DATATYPE_OF = {v: k for k, v in NUMPY_OF.items()}


class ProtocolError(FeatherweightError):
    """A message of the other end breaks the protocol; the text says which law, and the value found."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One input or output as metadata tells it. An axis of -1 may have any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """One tensor of a message before its values are read: JSON `data`, or `raw` bytes of the binary extension."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]
    data: Any
    raw: memoryview | None


@dataclass(frozen=True, slots=True)
class Message:
    """An inference request or answer: its JSON header and its tensors."""

    header: Mapping[str, Any]
    tensors: tuple[Given, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor ready to be sent as bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes
    parameters: Mapping[str, Any] = field(default_factory=dict)


def split_body(body: bytes, json_length: str | None, load: Any = json.loads) -> tuple[Any, memoryview]:
    """The JSON value and the raw bytes behind it. `json_length` is the header's text, None without the extension."""
    if json_length is None:
        return load(body), memoryview(b"")
    if not (json_length.isascii() and json_length.isdigit() and len(json_length) < 16):
        raise ProtocolError(f"{LENGTH_HEADER} must be a number of bytes, but got {json_length[:40]!r}")
    end = int(json_length)
    if end > len(body):
        raise ProtocolError(f"{LENGTH_HEADER} is {end}, but the body has only {len(body)} bytes")
    return load(body[:end]), memoryview(body)[end:]


def read_message(header: Any, raw: memoryview, key: str) -> Message:
    """The tensors under `key` ('inputs' or 'outputs') with their raw bytes cut out in order.

    Raises ProtocolError for a header that is not one, a size that does not fit, bytes left over.
    """
    if not isinstance(header, dict):
        raise ProtocolError(f"the JSON must be an object, but got {_kind(header)}")
    listed = header.get(key)
    if not isinstance(listed, list) or (not listed and key == "inputs"):
        raise ProtocolError(f"{key!r} must be a list of tensors, but got {_kind(listed)}")
    at, found, names = 0, [], set()
    for number, entry in enumerate(listed):
        given = _read_entry(entry, f"{key}[{number}]")
        size = given.parameters.get("binary_data_size")
        if size is not None:
            if given.data is not None:
                raise ProtocolError(f"tensor {_short(given.name)} has both 'data' and 'binary_data_size'; give one")
            if type(size) is not int or size < 0 or at + size > len(raw):
                raise ProtocolError(
                    f"binary_data_size of tensor {_short(given.name)} must be bytes that are there, but got "
                    f"{_short(size)} with {len(raw) - at} bytes left"
                )
            given = Given(given.name, given.datatype, given.shape, given.parameters, None, raw[at : at + size])
            at += size
        elif given.data is None:
            raise ProtocolError(f"tensor {_short(given.name)} must have 'data' or the parameter 'binary_data_size'")
        if given.name in names:
            raise ProtocolError(f"tensor {_short(given.name)} is given twice")
        names.add(given.name)
        found.append(given)
    if at != len(raw):
        raise ProtocolError(f"{len(raw) - at} bytes are left over after the last tensor")
    return Message(header, tuple(found))


def _read_entry(entry: Any, where: str) -> Given:
    if not isinstance(entry, dict):
        raise ProtocolError(f"{where} must be an object, but got {_kind(entry)}")
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    parameters = entry.get("parameters")
    parameters = {} if parameters is None else parameters  # KServe writes null
    if not isinstance(name, str) or not name:
        raise ProtocolError(f"{where}.name must be text, but got {_kind(name)}")
    if not isinstance(datatype, str) or datatype not in NUMPY_OF:
        raise ProtocolError(f"{where}.datatype must be one of {', '.join(NUMPY_OF)}, but got {_short(datatype)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or any(type(d) is not int for d in shape):
        raise ProtocolError(
            f"{where}.shape must be a list of at most {MAX_RANK} whole numbers, but got {_short(shape)}"
        )
    if any(not 0 <= d < 2**62 for d in shape):
        raise ProtocolError(f"{where}.shape must not have negative lengths, but got {_short(shape)}")
    if not isinstance(parameters, dict):
        raise ProtocolError(f"{where}.parameters must be an object, but got {_kind(parameters)}")
    return Given(name, datatype, tuple(shape), parameters, entry.get("data"), None)


def unpack(given: Given) -> Array:
    """The array of a tensor as it was sent. Raises ProtocolError if values and declared shape or type disagree."""
    if given.raw is None:
        return _from_json(given)
    count = math.prod(given.shape)
    if given.datatype == "BYTES":
        return _from_lengths(given, count)
    dtype = np.dtype(NUMPY_OF[given.datatype]).newbyteorder("<")
    if count * dtype.itemsize != len(given.raw):
        raise ProtocolError(
            f"tensor {_short(given.name)} of shape {_short(list(given.shape))} and type {given.datatype} must have "
            f"{count * dtype.itemsize} bytes, but got {len(given.raw)}"
        )
    if given.datatype == "BOOL":  # any other byte than 0 and 1 in a bool array is undefined for native code
        return np.asarray(np.frombuffer(given.raw, np.uint8) != 0).reshape(given.shape)
    value: Array = np.frombuffer(given.raw, dtype).reshape(given.shape)
    return np.asarray(np.require(value, dtype.newbyteorder("="), ["A", "C"]))


def _from_lengths(given: Given, count: int) -> Array:
    """BYTES: each element is its length in four bytes, then UTF-8 text."""
    raw, at = given.raw or memoryview(b""), 0
    if 4 * count > len(raw):
        raise ProtocolError(
            f"tensor {_short(given.name)} must have {4 * count} bytes or more for {count} elements, but got {len(raw)}"
        )
    out = np.empty(count, object)
    for i in range(count):
        length = int.from_bytes(raw[at : at + 4], "little")
        if at + 4 + length > len(raw):
            raise ProtocolError(f"element {i} of tensor {_short(given.name)} ends beyond its bytes")
        out[i] = _text(bytes(raw[at + 4 : at + 4 + length]), given.name)
        at += 4 + length
    if at != len(raw):
        raise ProtocolError(f"tensor {_short(given.name)} has {len(raw) - at} bytes after its last element")
    return out.reshape(given.shape)


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(f"tensor {_short(name)} must hold UTF-8 text, but an element is not") from None


def _from_json(given: Given) -> Array:
    """Values from nested or flat lists. Nothing is rounded or cut: 1.5 is no INT32, 300 is no UINT8."""
    name, kind = _short(given.name), np.dtype(NUMPY_OF[given.datatype]).kind
    flat = _flat(given)
    allowed: dict[str, set[type]] = {"b": {bool}, "f": {int, float}, "O": {str}}
    if not set(map(type, flat)) <= allowed.get(kind, {int}):
        raise ProtocolError(f"the data of tensor {name} must be {given.datatype} values, but holds others")
    try:
        with np.errstate(over="ignore"):
            value = np.array(flat, np.float64 if kind == "f" else NUMPY_OF[given.datatype])
            value = value.astype(NUMPY_OF[given.datatype], copy=False)
    except OverflowError:
        value = None
    if value is None or (kind == "f" and not np.isfinite(value).all()):
        raise ProtocolError(f"a value of tensor {name} is beyond the range of {given.datatype}")
    return value.reshape(given.shape)


def _flat(given: Given) -> list[Any]:
    """The values in one list: as they come, or out of lists nested exactly as the shape says."""
    data = given.data if isinstance(given.data, list) else [given.data]
    if data and isinstance(data[0], list):
        level = [data]
        for length in given.shape:
            if not all(isinstance(part, list) and len(part) == length for part in level):
                break
            level = list(itertools.chain.from_iterable(level)) if level else level
        else:
            return level
    elif len(data) == math.prod(given.shape):
        return data
    raise ProtocolError(
        f"the data of tensor {_short(given.name)} must be nested as the shape {_short(list(given.shape))} says, "
        f"or flat with {math.prod(given.shape)} values"
    )


def datatype_of(value: Array) -> str:
    """The protocol's name of an array's type. Raises ProtocolError if it has none."""
    kind = "object" if value.dtype.kind in "OUS" else value.dtype.name
    if kind not in DATATYPE_OF:
        raise ProtocolError(f"the protocol has no datatype for {kind}; use one of {', '.join(DATATYPE_OF)}")
    return DATATYPE_OF[kind]


def pack(name: str, value: Array) -> Packed:
    """An array as raw bytes of the binary extension."""
    datatype = datatype_of(value)
    if datatype == "BYTES":
        texts = (v if isinstance(v, bytes) else str(v).encode() for v in value.ravel())
        raw = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    else:
        raw = np.ascontiguousarray(value, np.dtype(NUMPY_OF[datatype]).newbyteorder("<")).tobytes()
    return Packed(name, datatype, tuple(value.shape), raw)


def json_tensor(name: str, value: Array) -> dict[str, Any]:
    """An array as a JSON tensor with flat data. Raises ProtocolError for NaN and infinity, which JSON has not."""
    datatype = datatype_of(value)
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ProtocolError(
            f"output {_short(name)} holds NaN or infinity, which JSON cannot carry; ask for binary data"
        )
    flat = value.ravel()
    data = [v.decode() if isinstance(v, bytes) else str(v) for v in flat] if datatype == "BYTES" else flat.tolist()
    return {"name": name, "datatype": datatype, "shape": list(value.shape), "data": data}


def write_message(
    header: Mapping[str, Any], key: str, tensors: Iterable[Packed | Mapping[str, Any]]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part if raw tensors follow it (None: JSON alone)."""
    entries: list[Mapping[str, Any]] = []
    raws: list[bytes] = []
    for tensor in tensors:
        if isinstance(tensor, Packed):
            parameters = {**tensor.parameters, "binary_data_size": len(tensor.raw)}
            entries.append({
                "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": parameters,
            })  # fmt: skip
            raws.append(tensor.raw)
        else:
            entries.append(tensor)
    head = json.dumps({**header, key: entries}, allow_nan=False, separators=(",", ":")).encode()
    return (b"".join([head, *raws]), len(head)) if raws else (head, None)


def read_specs(listed: Any, what: str) -> tuple[Spec, ...]:
    """Inputs or outputs of a model's metadata. Raises ProtocolError if they are not."""
    if not isinstance(listed, list):
        raise ProtocolError(f"the metadata's {what} must be a list, but got {_kind(listed)}")
    found: list[Spec] = []
    for entry in listed:
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(d) is int for d in shape):
            raise ProtocolError(f"the metadata's {what} must have names, datatypes and shapes, but got {_short(entry)}")
        found.append(Spec(str(entry.get("name")), str(entry.get("datatype")), tuple(shape)))
    return tuple(found)


def names(specs: Sequence[Spec]) -> list[str]:
    """The names of inputs or outputs."""
    return [s.name for s in specs]


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return words.get(type(value), "a number")


def _short(value: Any) -> str:
    """A stranger's value for a message: printable, and never long."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

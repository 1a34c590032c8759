"""How a request travels: whole, or its head here and its tail there; plain, or packed if the server can unpack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featherweight.edge import wire
from featherweight.edge.modes import Mode
from featherweight.edge.protocol import BINARY_EXTENSION, DATATYPE_OF, Array, Packed, Spec
from featherweight.edge.v2client import Connection, LinkError, Metadata, Reply
from featherweight.errors import DataError, ModelError
from featherweight.runtime import ort

PLAIN = "float32"


class Ways:
    """What the server offers of one model, and how to ask it. Thread-safe once made.

    Args:
        connection: to the server.
        head: the part that runs here; None without a split.
        tail: name of the other part at the server.
        whole: name of the whole model at the server.
        local: the local model: its inputs are what is asked with, its outputs what is answered.
        encoding: of float32 tensors on the wire, or 'float32'.
        binary: send raw tensors; None: if the server announces them.
    """

    def __init__(
        self, connection: Connection, *, head: ort.Session | None, tail: str | None, whole: str | None,
        local: ort.Session, encoding: str = PLAIN, binary: bool | None = None,
    ) -> None:  # fmt: skip
        if encoding not in (PLAIN, *wire.ENCODINGS):
            raise DataError(f"wire must be one of {', '.join((PLAIN, *wire.ENCODINGS))}, but got {encoding!r}")
        if (head is None) != (tail is None):
            raise ModelError("a head needs the name of its tail at the server, and the other way round; give both")
        self._connection, self._head, self._encoding, self._binary = connection, head, encoding, binary
        self._inputs = {i.name: i for i in local.inputs}
        self._outputs = [o.name for o in local.outputs]
        if head is not None:
            strangers = sorted({i.name for i in head.inputs} - self._inputs.keys())
            if strangers:
                raise ModelError(f"the head must take inputs of the local model only, but takes {strangers} too")
        self._models: dict[Mode, str] = {}
        if tail is not None:
            self._models["split"] = tail
        if whole is not None:
            self._models["remote"] = whole
        if not self._models:
            raise ModelError("name a model at the server: tail (with a head), whole, or both")
        self._offers: dict[Mode, Metadata] = {}

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The ways there are besides the local one."""
        return tuple(self._models)

    @property
    def encoding(self) -> str:
        """What float32 tensors travel as, with this server."""
        return (
            self._encoding
            if self._offers and all(wire.EXTENSION in m.extensions for m in self._offers.values())
            else PLAIN
        )

    def meet(self, mode: Mode, timeout_s: float) -> None:
        """Read the server's metadata and compare it with ours. Raises LinkError ('protocol' if they do not fit)."""
        name = self._models[mode]
        found = self._connection.metadata(name, timeout_s)
        ours = {i.name: i.dtype for i in (*self._inputs.values(), *(self._head.outputs if self._head else ()))}
        for spec in found.inputs:
            if DATATYPE_OF.get(ours.get(spec.name, "")) != spec.datatype:
                raise LinkError(
                    "protocol",
                    f"the server's model {name!r} takes {spec.name!r} as {spec.datatype}, "
                    f"but here it is {ours.get(spec.name, 'unknown')}; serve the tail that belongs to this head",
                )
        given = {s.name for s in found.outputs} | (
            {o.name for o in self._head.outputs} if mode == "split" and self._head else set()
        )
        missing = sorted(set(self._outputs) - given)
        if missing:
            raise LinkError("protocol", f"the server's model {name!r} must give {self._outputs}; missing: {missing}")
        self._offers[mode] = found

    def ask(self, mode: Mode, feeds: Mapping[str, Array], timeout_s: float) -> Reply:
        """The answer of the server. Raises LinkError; RunError if the head cannot run."""
        offer = self._offers[mode]
        here: dict[str, Array] = {}
        if mode == "split" and self._head is not None:
            here = self._head.run({i.name: feeds[i.name] for i in self._head.inputs})
        there = {s.name for s in offer.outputs}
        wanted = [name for name in self._outputs if name in there]
        travelling = {s.name: self._packed(s, here[s.name] if s.name in here else feeds[s.name]) for s in offer.inputs}
        binary = BINARY_EXTENSION in offer.extensions if self._binary is None else self._binary
        reply = self._connection.infer(
            self._models[mode], travelling, outputs=wanted, timeout_s=timeout_s, binary=binary
        )  # fmt: skip
        outputs = {n: reply.outputs[n] if n in reply.outputs else here[n] for n in self._outputs}
        return Reply(outputs, reply.sent_bytes, reply.received_bytes)

    def _packed(self, spec: Spec, value: Array) -> Array | Packed:
        if self.encoding == PLAIN or value.dtype != np.float32:
            return value
        packet = wire.encode(value, self._encoding)
        if packet is None:
            return value
        return Packed(spec.name, spec.datatype, value.shape, packet, {wire.EXTENSION: self._encoding})

    def zeros(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Inputs of zeros to measure with: of the shapes last seen, else with 1 for open axes."""
        found: dict[str, Array] = {}
        for name, info in self._inputs.items():
            shape = shapes.get(name) or [d if isinstance(d, int) and d > 0 else 1 for d in info.shape]
            found[name] = np.full(shape, "", object) if info.dtype == "object" else np.zeros(shape, info.dtype)
        return found


def checked(feeds: Mapping[str, Array], inputs: Sequence[ort.TensorInfo]) -> dict[str, Array]:
    """The inputs of a request as arrays. Raises DataError for names, types or shapes the model does not take."""
    wanted = {i.name: i for i in inputs}
    if feeds.keys() != wanted.keys():
        raise DataError(f"the model takes the inputs {sorted(wanted)}, but got {sorted(feeds)}")
    found: dict[str, Array] = {}
    for name, value in feeds.items():
        array, info = np.asarray(value), wanted[name]
        kind = "object" if array.dtype.kind in "OUS" else array.dtype.name
        fits = array.ndim == len(info.shape) and all(
            not isinstance(w, int) or w < 0 or w == g for w, g in zip(info.shape, array.shape, strict=True)
        )
        if kind != info.dtype or not fits:
            raise DataError(
                f"input {name!r} must be {info.dtype} of shape {list(info.shape)}, "
                f"but got {array.dtype.name} of shape {list(array.shape)}"
            )
        found[name] = array
    return found

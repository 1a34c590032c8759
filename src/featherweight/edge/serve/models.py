"""A model ready to serve: what it takes, whether requests may share a batch, and its checks on a request."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.edge.http import RequestError
from featherweight.edge.protocol import DATATYPE_OF, Array, Spec
from featherweight.errors import ModelError, RunError
from featherweight.runtime import ort

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
VERSION = "1"
_SAME = 1e-3
"""Answers alone and in a batch may differ by this part of the largest value: the order of sums, never the meaning."""
_TRIED_LENGTHS = (8, 16, 32, 64, 224)
"""Lengths tried for open axes other than the batch when a model is tested for batching."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model.

    `inputs` and `outputs` have -1 for open axes; `symbols` the names of the inputs' open axes. `batched` says that
    requests may be joined along axis 0, and `why` how that was found out.
    """

    name: str
    session: ort.Session
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    symbols: Mapping[str, tuple[int | str | None, ...]]
    batched: bool
    why: str
    max_axis: int

    def check(self, feeds: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
        """Rows of a request (1 without a batch axis). `feeds` has datatype and shape by input name.

        Raises RequestError(400) naming the law that is broken, before any value is read.
        """
        known = {i.name: i for i in self.inputs}
        missing, unknown = sorted(known.keys() - feeds.keys()), sorted(feeds.keys() - known.keys())
        if missing or unknown:
            raise RequestError(
                400,
                f"model {self.name} takes the inputs {sorted(known)}"
                + (f"; missing: {missing}" if missing else "")
                + (f"; unknown: {[u[:80] for u in unknown[:8]]}" if unknown else ""),
            )
        lengths: dict[str, int] = {}
        for name, (datatype, shape) in feeds.items():
            self._check_one(known[name], datatype, shape, lengths)
        if not self.batched:
            return 1
        rows = {shape[0] for _, shape in feeds.values()}
        if len(rows) != 1:
            raise RequestError(400, f"all inputs must have the same first axis, but got the lengths {sorted(rows)}")
        return rows.pop()

    def _check_one(self, want: Spec, datatype: str, shape: tuple[int, ...], lengths: dict[str, int]) -> None:
        if datatype != want.datatype:
            raise RequestError(400, f"input {want.name!r} must be {want.datatype}, but got {datatype}")
        fits = len(shape) == len(want.shape) and all(w in (-1, g) for w, g in zip(want.shape, shape, strict=True))
        if not fits:
            raise RequestError(
                400, f"input {want.name!r} must have the shape {list(want.shape)} (-1: any), but got {list(shape)}"
            )
        for axis, (length, symbol) in enumerate(zip(shape, self.symbols[want.name], strict=True)):
            if want.shape[axis] != -1:
                continue
            if not 1 <= length <= self.max_axis:
                raise RequestError(
                    400, f"axis {axis} of input {want.name!r} must be in 1..{self.max_axis}, but got {length}"
                )
            if isinstance(symbol, str) and symbol and lengths.setdefault(symbol, length) != length:
                raise RequestError(
                    400, f"axis {axis} of input {want.name!r} ({symbol!r}) must be {lengths[symbol]}, but got {length}"
                )

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run once. Raises RequestError: 400 if the model refuses these values, 413 if memory does not suffice."""
        try:
            return self.session.run(feeds, outputs)
        except RunError as e:
            text = str(e)
            if "out of memory" in text:
                raise RequestError(413, f"model {self.name} has not enough memory for inputs of this size") from e
            raise RequestError(400, f"model {self.name} cannot run these inputs: {text[-400:]}") from e


def split_name(argument: str) -> tuple[str, Path]:
    """Name and path of 'model.onnx' or 'name=model.onnx'. Raises ModelError for a name that no URL should hold."""
    name, sep, path = argument.partition("=")
    if not sep or "/" in name:
        name, path = re.sub(r"[^A-Za-z0-9_.-]", "_", Path(argument).stem).lstrip(".-") or "model", argument
    if NAME.fullmatch(name) is None:
        raise ModelError(f"a model's name must have letters, digits, '_', '.' and '-' only, but got {name[:80]!r}")
    return name, Path(path)


def load_all(arguments: Sequence[str], *, threads: int | None, batching: bool, max_axis: int) -> list[Model]:
    """Models of 'model.onnx' or 'name=model.onnx' arguments. Raises ModelError if two have one name."""
    named: dict[str, Path] = {}
    for argument in arguments:
        name, path = split_name(argument)
        if name in named:
            raise ModelError(
                f"each model must have a name of its own, but {named[name]} and {path} are both {name!r}; "
                "write other_name=model.onnx"
            )
        named[name] = path
    count = threads or os.cpu_count() or 1
    return [load(n, p, threads=count, batching=batching, max_axis=max_axis) for n, p in named.items()]


def load(name: str, path: Path, *, threads: int, batching: bool = True, max_axis: int = 4096) -> Model:
    """Load and test a model.

    Args:
        name: under which it is served.
        path: of the ONNX file.
        threads: of one run.
        batching: False never joins requests.
        max_axis: longest open axis of an input that is accepted.

    Raises ModelError or RunError if the file cannot be served.
    """
    session = ort.session(path, threads=threads)
    model = Model(
        name, session, _specs(session.inputs, name), _specs(session.outputs, name),
        {i.name: i.shape for i in session.inputs}, False, "batching is off", max_axis,
    )  # fmt: skip
    if not batching:
        return model
    why_not = _named_apart(session)
    if why_not is None:
        why_not = _tested_apart(model)
    if why_not is not None:
        return replace(model, why=f"requests run alone: {why_not}")
    return replace(model, batched=True, why="requests are joined along axis 0; tested on random inputs when loaded")


def _specs(infos: Sequence[ort.TensorInfo], name: str) -> tuple[Spec, ...]:
    found = []
    for info in infos:
        if info.dtype not in DATATYPE_OF:
            raise ModelError(
                f"model {name}: {info.name!r} has the type {info.dtype}, which the protocol has no word for; "
                f"cast it to one of {', '.join(sorted(DATATYPE_OF))} in the model"
            )
        shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in info.shape)
        found.append(Spec(info.name, DATATYPE_OF[info.dtype], shape))
    return tuple(found)


def _named_apart(session: ort.Session) -> str | None:
    """Why the first axes, by their names, are no common batch axis; None if they may be one."""
    firsts: set[str] = set()
    for info in (*session.inputs, *session.outputs):
        if not info.shape:
            return f"{info.name!r} is a single value"
        if isinstance(info.shape[0], int):
            return f"the first axis of {info.name!r} is fixed at {info.shape[0]}"
        if info in session.inputs:
            firsts.add(info.shape[0] or "")
    if len(firsts) > 1:
        return f"the inputs' first axes have different names {sorted(firsts)}"
    return None


def _tested_apart(model: Model) -> str | None:
    """Why the answers in a batch are not those of each row alone; None if they are the same.

    Names alone do not tell: an axis may be time, and a scale computed over the whole batch couples its rows.
    """
    failure = ""
    for length in _TRIED_LENGTHS:
        rows = [_random_feeds(model, length, seed) for seed in (1, 2, 3)]
        names = [o.name for o in model.outputs]
        try:
            alone = [model.session.run(feeds, names) for feeds in rows]
        except RunError as e:
            failure = str(e)
            continue
        try:
            together = model.session.run({k: np.concatenate([r[k] for r in rows]) for k in rows[0]}, names)
        except RunError:
            return "it does not run with three rows at once"
        for name in names:
            if not _rows_equal([a.get(name) for a in alone], together.get(name)):
                return f"output {name!r} of a row depends on the other rows of its batch"
        return None
    return f"it could not be tested with random inputs ({failure[-160:]})"


def _random_feeds(model: Model, length: int, seed: int) -> dict[str, Array]:
    """One row: normal floats, and whole numbers 0 or 1, which any table of ids has."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in model.inputs:
        shape = (1, *(length if d == -1 else d for d in spec.shape[1:]))
        if spec.datatype == "BYTES":
            feeds[spec.name] = np.full(shape, f"row {seed}", object)
        elif spec.datatype.startswith("FP"):
            feeds[spec.name] = rng.standard_normal(shape).astype(f"float{spec.datatype[2:]}")
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.datatype.lower())
    return feeds


def _rows_equal(alone: Sequence[Any], together: Any) -> bool:
    if together is None or any(a is None or a.shape[:1] != (1,) for a in alone):
        return False
    joined = np.concatenate(alone) if len({a.shape for a in alone}) == 1 else None
    if joined is None or joined.shape != together.shape:
        return False
    if joined.dtype.kind != "f":
        return bool(np.array_equal(joined, together))
    bound = _SAME * float(np.nanmax(np.abs(joined), initial=0.0))
    return bool(np.allclose(joined, together, rtol=0, atol=max(bound, 1e-6), equal_nan=True))

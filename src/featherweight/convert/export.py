"""From a PyTorch module or an exported program to a checked ONNX file.

The way is `torch.export` and then `torch.onnx.export` of that program. Axes are offered as open; one that tracing fixed
for form's sake only (recurrent layers) is opened again if the file then agrees with the source at other sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io as std_io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from featherweight.convert import attention, causes, tidy, verify
from featherweight.convert import axes as fw_axes
from featherweight.core import Note
from featherweight.errors import DataError, ModelError, RunError
from featherweight.graph import io


@dataclass(frozen=True)
class Source:
    """What is converted.

    `run` takes (args, kwargs) and gives what the source gives; `module` is None for a program, which is exported as it
    is. `prefix` is cut off names; `examples` are (args, kwargs); `names` of outputs, None: found from what `run` gives.
    """

    label: str
    examples: tuple[tuple[Any, ...], dict[str, Any]]
    module: torch.nn.Module | None = None
    program: torch.export.ExportedProgram | None = None
    prefix: str = ""
    notes: tuple[Note, ...] = ()
    axes: fw_axes.Axes | None = None

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The source's own answer."""
        runnable = self.module if self.module is not None else _runnable(self.program)
        with torch.no_grad(), quiet():
            return runnable(*args, **kwargs)


def _runnable(program: torch.export.ExportedProgram | None) -> torch.nn.Module:
    if program is None:
        raise ModelError("there is neither a module nor a program to convert")
    return program.module()


def convert(source: Source, out: Path, dynamic: Any) -> tuple[verify.Check, tuple[Note, ...]]:
    """Write the ONNX file of `source`, checked. Raises ModelError with the cause of what cannot be exported."""
    traced = _Traced(source, dynamic)
    wanted = traced.axes
    notes = list(source.notes)
    model, closed = traced.export(wanted)
    try:
        check = _written(traced, model, wanted, out)
        if all(len({s[label] for s in check.sizes}) > 1 for _, _, label in closed):
            return check, tuple(notes)
    except (verify.DifferentError, RunError):
        if not closed:
            raise
    if dynamic not in (None, False):
        name, axis, label = closed[0]
        raise ModelError(
            f"axis {axis} ({label}) of the input {name!r} cannot stay open: {source.label} computes with its size as a "
            "number; leave it out of dynamic, or take the size from the tensor's shape"
        )
    shut = {(name, axis) for name, axis, _ in closed}
    kept = {n: {a: label for a, label in axes.items() if (n, a) not in shut} for n, axes in wanted.items()}
    model, _ = traced.export(kept)
    for name, axis, label in closed:
        size = dict(traced.inputs)[name].shape[axis]
        notes.append(
            Note(name, f"its {label} axis is fixed at {size}: {source.label} computes with the size as a number")
        )
    return _written(traced, model, kept, out), tuple(notes)


def _written(traced: _Traced, model: ir.Model, axes: fw_axes.Axes, out: Path) -> verify.Check:
    tidy.name_axes(model, axes)
    io.save(model, out)
    check = verify.check(out, traced.call, traced.inputs, axes, traced.source.label)
    if tidy.name_output_axes(model, check.sizes, check.shapes):
        io.save(model, out)
    return check


class _Traced:
    """A source with its inputs as a flat list of named tensors."""

    def __init__(self, source: Source, dynamic: Any) -> None:
        self.source = source
        args, kwargs = source.examples
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._names = _leaf_names(source, args, kwargs, len(self._leaves))
        self.inputs = [(n, t) for n, t in zip(self._names, self._leaves, strict=True) if isinstance(t, torch.Tensor)]
        if not self.inputs:
            raise DataError(f"{source.label} needs at least one tensor among its example inputs")
        empty = next((name for name, t in self.inputs if not t.numel()), None)
        if empty is not None:
            raise DataError(f"the example of the input {empty!r} must have at least one element, but it is empty")
        self.axes = fw_axes.open_axes(self.inputs, source.axes if dynamic is None and source.axes else dynamic)
        if source.program is not None:
            self.axes = _open_in(source.program, self.axes)

    def call(self, tensors: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """The source on other tensors, other arguments as in the examples."""
        args, kwargs = self._filled(tensors)
        return named_outputs(self.source.run(args, kwargs), self.source.label)

    def _filled(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fresh = iter(tensors)
        leaves = [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs

    def export(self, axes: fw_axes.Axes) -> tuple[ir.Model, list[tuple[str, int, str]]]:
        """The tidy ONNX model and the axes (input, axis, name) that were to be open but are not."""
        label = self.source.label
        buffers = [] if self.source.module is None else list(self.source.module.named_buffers())
        kept = [(name, b, b.clone(), b._version) for name, b in buffers]
        try:
            outputs = [name for name, _ in self.call([t for _, t in self.inputs])]
        except ModelError:
            raise
        except Exception as e:
            raise DataError(f"{label} does not run on its example inputs: {causes.first_line(e)}") from e
        _check_buffers(kept, label)
        try:
            with quiet(), torch.no_grad():
                program = self.source.program or self._program(axes)
                _check_state(program, label, exported=self.source.program is not None)
                made = torch.onnx.export(
                    program, dynamo=True, verbose=False, optimize=False, custom_translation_table=attention.plain()
                )
        except ModelError:
            raise
        except Exception as e:
            raise ModelError(f"{label} cannot become ONNX: {causes.cause(e)}") from e
        if made is None:
            raise ModelError(f"{label} cannot become ONNX: the exporter gave nothing")
        model = made.model
        tidy.tidy(model, parameters=_first_names(self.source, program), prefix=self.source.prefix, outputs=outputs)
        return model, _closed(model, axes)

    def _program(self, axes: fw_axes.Axes) -> torch.export.ExportedProgram:
        module = self.source.module
        if module is None:
            raise ModelError("there is no module to trace")
        tensors = fw_axes.resized(self.inputs, axes, fw_axes.tracing_sizes(fw_axes.sizes_of(self.inputs, axes)))
        args, kwargs = self._filled([t for _, t in tensors])
        marks = {name: dict.fromkeys(found, torch.export.Dim.AUTO) for name, found in axes.items()}
        leaves = [
            marks[name] if isinstance(leaf, torch.Tensor) else None
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        marked_args, marked_kwargs = pytree.tree_unflatten(leaves, self._spec)
        shapes = _bound(module, marked_args, marked_kwargs)
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _bound(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the name of the parameter of `forward` that takes them."""
    found = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in found:
            found.update(found.pop(name))
    return found


def _leaf_names(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> list[str]:
    """A name for each leaf of (args, kwargs), as the exporter names its inputs."""
    if source.program is not None:
        user = list(source.program.graph_signature.user_inputs)
        if len(user) != n:
            raise DataError(f"{source.label} takes {len(user)} inputs, but {n} examples were given")
        return [u if isinstance(u, str) else f"constant_{i}" for i, u in enumerate(user)]
    if source.module is None:
        raise ModelError("there is neither a module nor a program to convert")
    try:
        bound = _bound(source.module, args, kwargs)
    except TypeError as e:
        raise DataError(f"{source.label} does not take these example inputs: {e}") from e
    paths, _ = pytree.tree_flatten_with_path(bound)
    return ["_".join(_key(k) for k in path) for path, _ in paths]


def _key(part: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def named_outputs(given: Any, label: str) -> list[tuple[str, torch.Tensor]]:
    """Tensors of what a module returned: `output`, `output_0`, or by their keys. Raises ModelError for other values."""
    if isinstance(given, torch.Tensor):
        return [("output", given)]
    found = []
    paths, _ = pytree.tree_flatten_with_path(given)
    plain = not isinstance(given, Mapping) and not dataclasses.is_dataclass(given)
    for path, value in paths:
        if value is None:
            continue
        name = "_".join(_key(k) for k in path)
        name = f"output_{name}" if plain else name
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{label} must return tensors, but {name!r} is a {type(value).__name__}; leave it out")
        found.append((name, value))
    if not found:
        raise ModelError(f"{label} must return at least one tensor, but it returns none")
    return [("output", found[0][1])] if plain and len(found) == 1 else found


def _open_in(program: torch.export.ExportedProgram, wanted: fw_axes.Axes) -> fw_axes.Axes:
    """The axes that are open in a program: those wanted keep their name, the others get one of the input's."""
    shapes = {n.name: n.meta["val"].shape for n in program.graph.nodes if n.op == "placeholder" and _is_tensor(n)}
    found: fw_axes.Axes = {}
    for name, axes in wanted.items():
        free = [i for i, d in enumerate(shapes.get(name, ())) if isinstance(d, torch.SymInt)]
        found[name] = {axis: axes.get(axis, f"{name}_{axis}") for axis in free}
    return found


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _closed(model: ir.Model, axes: fw_axes.Axes) -> list[tuple[str, int, str]]:
    shapes = tidy.input_symbols(model)
    return [
        (name, axis, label)
        for name, found in axes.items()
        for axis, label in found.items()
        if name in shapes and not isinstance(shapes[name][axis], str)
    ]


def _first_names(source: Source, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Each parameter's name to the first name of what it is tied to."""
    if source.module is not None:
        every: list[tuple[str, torch.Tensor]] = list(source.module.named_parameters(remove_duplicate=False))
        every += list(source.module.named_buffers(remove_duplicate=False))
    else:
        every = list(program.state_dict.items())
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault((t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype), name)
        for name, t in every
        if t.numel()
    }


def _check_buffers(kept: Sequence[tuple[str, torch.Tensor, torch.Tensor, int]], label: str) -> None:
    """Refuse a module that changes its buffers when run, and put them back."""
    changed = [(name, b, before) for name, b, before, version in kept if b._version != version]
    for _, buffer, before in changed:
        buffer.copy_(before)
    if changed:
        raise _keeps_state(label, changed[0][0])


def _keeps_state(label: str, buffer: str) -> ModelError:
    return ModelError(
        f"{label} changes its buffer {buffer!r} at each call, but an ONNX graph keeps no state; "
        "make it an input and an output"
    )


_TRAINING = {"aten.dropout": 2, "aten.feature_dropout": 2, "aten.alpha_dropout": 2, "aten.batch_norm": 5}


def _check_state(program: torch.export.ExportedProgram, label: str, *, exported: bool) -> None:
    """Refuse what an inference graph cannot hold: training behaviour, and buffers that change from call to call."""
    for node in program.graph.nodes:
        place = _TRAINING.get(str(node.target).rpartition(".")[0])
        if place is not None and len(node.args) > place and node.args[place] is True:
            way = (
                f"was exported in training mode ({node.target}); call module.eval() before torch.export.export"
                if exported
                else f"trains even in eval mode ({node.target}); pass it training=self.training"
            )
            raise ModelError(f"{label} {way}")
    changed = [str(b) for b in program.graph_signature.buffers_to_mutate.values()]
    if changed:
        raise _keeps_state(label, changed[0])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what modules print and exporters warn reaches the user's terminal; causes come as errors."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(std_io.StringIO()),
            contextlib.redirect_stderr(std_io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

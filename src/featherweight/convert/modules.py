"""PyTorch modules and exported programs as sources of a conversion, with their example inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight.convert.export import Source
from featherweight.core import Note
from featherweight.errors import DataError, ModelError

WIDE = (torch.float16, torch.bfloat16, torch.float64)
"""Types whose module is computed in float32 instead: processors have fast operators for that."""


def from_module(module: torch.nn.Module, examples: Any) -> Source:
    """A module, on the processor and in float32. Raises DataError without examples."""
    label = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{label} is TorchScript, which torch.export does not read; give the module it was made from")
    if examples is None:
        raise DataError(
            f"converting {label} needs an example of its inputs: give example_inputs=, a tensor or a tuple of tensors "
            "as its forward takes them, or data with an array called like each of its parameters"
        )
    notes: list[Note] = []
    tensors = [*module.parameters(), *module.buffers()]
    types = {t.dtype for t in tensors if t.is_floating_point()}
    elsewhere = any(t.device.type != "cpu" for t in tensors)
    if elsewhere or types & set(WIDE):
        module = copy.deepcopy(module).cpu()
        if types & set(WIDE):
            module = module.float()
            names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types & set(WIDE)))
            notes.append(Note(label, f"computed in float32 instead of {names}"))
    return Source(label, _arguments(examples, narrow=bool(notes)), module=module, notes=tuple(notes))


def from_program(program: torch.export.ExportedProgram, examples: Any, *, label: str) -> Source:
    """A program with examples of its own, or made from the shapes it was exported with."""
    if examples is not None:
        given = _arguments(examples)
    elif program.example_inputs:
        args, kwargs = program.example_inputs
        given = (tuple(args), dict(kwargs))
    else:
        given = _made(program)
    return Source(label, given, program=program)


def from_pickle(path: Path, examples: Any) -> Source:
    """A module saved whole with torch.save, from a file the user trusts. Raises ModelError for anything else.

    `examples` may be a function of the module that gives them.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:
        line = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ModelError(f"{path} cannot be loaded: {line}") from e
    if isinstance(found, torch.nn.Module):
        return from_module(found, examples(found) if callable(examples) else examples)
    held = "weights by name" if isinstance(found, Mapping) else f"a {type(found).__name__}"
    raise ModelError(
        f"{path} holds {held} but no network to put them in; load it into its module and give fw.compress that module, "
        "or save it with torch.export.save as .pt2"
    )


def _arguments(examples: Any, *, narrow: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a tensor, a sequence, a mapping, or of (args, kwargs) itself."""
    if isinstance(examples, Mapping):
        return (), {str(k): _tensor(v, narrow) for k, v in examples.items()}
    if isinstance(examples, torch.Tensor | np.ndarray):
        return (_tensor(examples, narrow),), {}
    if isinstance(examples, Sequence) and not isinstance(examples, str):
        if len(examples) == 2 and isinstance(examples[0], tuple) and isinstance(examples[1], dict):
            return tuple(_tensor(v, narrow) for v in examples[0]), {
                str(k): _tensor(v, narrow) for k, v in examples[1].items()
            }
        return tuple(_tensor(v, narrow) for v in examples), {}
    raise DataError(f"example inputs must be tensors, a tuple of them or a mapping, but got {type(examples).__name__}")


def _tensor(value: Any, narrow: bool) -> Any:
    """Arrays as tensors on the processor, containers part by part, anything else as it is."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float() if narrow and value.dtype in WIDE else value
    if isinstance(value, Mapping):
        return {k: _tensor(v, narrow) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_tensor(v, narrow) for v in value)
    return value


def _made(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Examples of the shapes a program was exported with: random floats, zeros else."""
    wanted = [u for u in program.graph_signature.user_inputs if isinstance(u, str)]
    fakes = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    rng = torch.Generator().manual_seed(0)
    leaves = []
    for name in wanted:
        shape = [int(d) if isinstance(d, int) else d.node.hint or 2 for d in fakes[name].shape]
        dtype = fakes[name].dtype
        leaves.append(
            torch.randn(shape, generator=rng).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        )
    spec = program.call_spec.in_spec
    if spec is None or spec.num_leaves != len(leaves):
        raise DataError("the program carries no example inputs; give example_inputs=")
    args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)

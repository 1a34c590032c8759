"""Any ONNX graph as a torch module: what the graph computes, with gradients to its weights.

`onnx_ir.Model` in, the same model with trained values out (`write_back`): names, encodings, types and ties stay.
Weights stored as codes show as the float they stand for (their latent value), rounded to the same grid or codebook at
each use; the gradient passes the rounding straight through. Operators that are not known are run by ONNX Runtime and
stop the gradient; `fenced` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from featherweight.core import Note
from featherweight.errors import DataError, ModelError
from featherweight.graph import surgery
from featherweight.learn import _parameters, _tensors
from featherweight.learn._choices import SCALES, Scales
from featherweight.learn._grids import Grid
from featherweight.learn._program import Plan, Program

Feeds = Mapping[str, Tensor]


class Executor(nn.Module):
    """Executes a model on torch tensors.

    Args:
        model: not changed; functions are inlined in a private copy.
        trainable: narrows the weights that are trained, by name; None trains all that the graph uses as weights.
        train_scales: "weights": also train the scales and codebooks of encoded weights; "all": and the scales of other
            QuantizeLinear and DequantizeLinear. Those of integer biases follow from the others.
        keep_zeros: weights of which a part is exactly 0 (pruned) keep those zeros.

    Raises:
        ModelError: a graph that cannot be executed (a control-flow operator with an unknown form, strings).
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        trainable: Callable[[str], bool] | None = None,
        train_scales: Scales = "none",
        keep_zeros: bool = True,
    ) -> None:
        super().__init__()
        if train_scales not in SCALES:
            raise ValueError(f"train_scales must be one of {', '.join(SCALES)}, but got {train_scales!r}")
        copy = surgery.copy_model(model)
        if copy.functions:
            common.InlinePass()(copy)
        # Scales may stand in Constant nodes, behind what they are parts of; initializers are there from the start.
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
        surgery.sort(copy)
        self._program = Program(copy)
        chosen = _parameters.choose(copy, trainable, train_scales=train_scales, keep_zeros=keep_zeros)
        self._trained = chosen.trained
        self._tensors = nn.ParameterList([nn.Parameter(t.initial.clone()) for t in self._trained])
        self._shapers = nn.ModuleList(chosen.modules)
        self._slots = chosen.number(self._program)
        self._program.compile()
        self.fenced: tuple[Note, ...] = (*chosen.notes, *self._program.notes)
        self._plans: dict[tuple[tuple[int, ...], tuple[int, ...]], Plan] = {}
        graph = copy.graph
        self._inputs = {v.name or "": v for v in graph.inputs}
        self._outputs = {v.name or "": v for v in graph.outputs}
        self._named = {v.name: v for v in self._program.numbers if v.name and v.graph is graph}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Executor:
        """Constants move with the parameters; integers among them stay (shapes are computed on the CPU)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        constants = self._program.constants
        for number, tensor in constants.items():
            constants[number] = fn(tensor) if tensor.is_floating_point() else tensor
        return self

    def forward(self, feeds: Feeds, *, fetch: Sequence[str] = ()) -> dict[str, Tensor]:
        """Outputs of the graph, and intermediate tensors by name.

        Args:
            feeds: a tensor for each input, in the shape and type the graph declares (float64 works too).
            fetch: names of further values to return.

        Raises:
            DataError: inputs are missing or unknown; the text names them.
            ModelError: a fetched name is not in the graph.
            RunError: an operator fails; the text names it and its node.
        """
        self._check(feeds)
        values = {**self._outputs, **{name: self._find(name) for name in fetch}}
        return self._run(feeds, values)

    def segment(self, inputs: Sequence[str], outputs: Sequence[str]) -> Callable[[Feeds], dict[str, Tensor]]:
        """The part of the graph from some values to others as a function; it shares the parameters.

        Raises:
            ModelError: a name is not in the graph, or an output needs an input of the graph that is not among
                `inputs`; the text names it.
        """
        given = {name: self._find(name) for name in inputs}
        wanted = {name: self._find(name) for name in outputs}
        plan = self._plan([self._program.number(v) for v in given.values()],
                          [self._program.number(v) for v in wanted.values()])  # fmt: skip
        numbers = {self._program.numbers.get(v): n for n, v in self._inputs.items()}
        known = {self._program.number(v) for v in given.values()} | set(self._program.constants) | set(self._slots)
        missing = [numbers.get(i) or "?" for i in plan.reads if i not in known]
        if missing:
            raise ModelError(f"{list(outputs)} also need the inputs {missing}, but only {list(inputs)} are given")

        def run(feeds: Feeds) -> dict[str, Tensor]:
            absent = sorted(set(given) - set(feeds))
            if absent:
                raise DataError(f"this part of the graph takes {sorted(given)}, but {absent} are missing")
            return self._run({name: feeds[name] for name in given}, wanted)

        return run

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What is trained, by the name it has in the graph; a tied weight appears once."""
        return {t.name: p for t, p in zip(self._trained, self._tensors, strict=True)}

    def scales(self) -> frozenset[str]:
        """Names of the parameters that are scales of quantizers."""
        return frozenset(t.name for t in self._trained if isinstance(t.shaper, _parameters.Scale))

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Names of the scales and codebooks that a parameter's codes stand on."""
        return tuple(p.name or "" for t in self._trained if t.name == name for p in t.parts)

    def grids(self) -> dict[str, Grid]:
        """For each parameter that is rounded on use: the step of its grid, and the name of the rounded value."""
        tensors = self._final()
        found = {t.name: t.grid(tensors) for t in self._trained}
        return {name: grid for name, grid in found.items() if grid is not None}

    def _final(self) -> dict[str, Tensor]:
        return {t.name: t.final(p) for t, p in zip(self._trained, self._tensors, strict=True)}

    def write_back(self, model: ir.Model) -> ir.Model:
        """A copy of `model` whose stored tensors hold the trained values, in the types and encodings they had.

        `model` must have the tensors this was made of, by name; what was not trained keeps its bytes.
        Raises ModelError where a tensor is missing or has another shape.
        """
        copy = surgery.copy_model(model)
        tensors = self._final()
        for trained in self._trained:
            trained.store(copy, tensors)
        return copy

    def _find(self, name: str) -> ir.Value:
        found = self._named.get(name) or self._inputs.get(name)
        if found is None:
            raise ModelError(f"{name!r} must be a tensor that the outputs depend on, but the graph has none")
        return found

    def _check(self, feeds: Feeds) -> None:
        required = {n for n, v in self._inputs.items() if not v.is_initializer()}
        missing, unknown = sorted(required - set(feeds)), sorted(set(feeds) - set(self._inputs))
        if missing or unknown:
            raise DataError(
                f"the graph takes the inputs {sorted(self._inputs)}, but got {sorted(feeds)}"
                + (f"; missing: {missing}" if missing else "")
                + (f"; unknown: {unknown}" if unknown else "")
            )

    def _plan(self, inputs: Sequence[int], outputs: Sequence[int]) -> Plan:
        key = (tuple(inputs), tuple(outputs))
        if key not in self._plans:
            self._plans[key] = self._program.plan(inputs, outputs)
        return self._plans[key]

    def _run(self, feeds: Feeds, wanted: Mapping[str, ir.Value]) -> dict[str, Tensor]:
        program = self._program
        given = {program.number(self._find(name)): tensor for name, tensor in feeds.items()}
        numbers = {name: program.number(value) for name, value in wanted.items()}
        plan = self._plan(list(given), list(numbers.values()))
        values: list[Any] = [None] * program.size
        for number, tensor in program.constants.items():
            values[number] = tensor
        for number, parameter in zip(self._slots, self._tensors, strict=True):
            values[number] = parameter
        for number, tensor in given.items():
            values[number] = torch.as_tensor(tensor)
        plan.run(values)
        return {name: _tensors.as_declared(values[numbers[name]], value.dtype) for name, value in wanted.items()}

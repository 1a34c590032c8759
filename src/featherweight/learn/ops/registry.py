"""Which operators can be executed with gradients, and since which opset each form of them holds.

An operator is a function from a `Call` (what is known before any data) to a kernel (tensors in, tensors out), so that
attributes and constants are read once and a training step pays for arithmetic alone. A new operator is one decorated
function; its gradient is checked by an entry in the tests, whose absence fails them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
from torch import Tensor

from featherweight.errors import ModelError

Kernel = Callable[..., Any]
"""Takes the inputs in order (None: absent), gives the output, or a tuple of them."""
Gradient = Literal["exact", "straight-through", "none"]
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Call:
    """One node before any data: its attributes, and the content of those inputs that are constant (None: are not).

    `bodies` are the executable sub-graphs by attribute name; `reads` the count of values they take from outside, which
    the kernel gets after its own inputs.
    """

    node: ir.Node
    opset: int
    constants: tuple[Tensor | None, ...]
    bodies: dict[str, Any]

    @property
    def n_outputs(self) -> int:
        """Outputs up to the last that has a name."""
        named = [i for i, value in enumerate(self.node.outputs) if value.name]
        return named[-1] + 1 if named else 0

    def has(self, index: int) -> bool:
        """True if input `index` is there."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def constant(self, index: int) -> Tensor | None:
        """Content of an input known before any data."""
        return self.constants[index] if index < len(self.constants) else None

    def fixed_ints(self, index: int) -> list[int] | None:
        """A constant input as integers; None if it is absent or not constant."""
        found = self.constant(index)
        return None if found is None else ints(found)

    def attr(self, name: str) -> Any:
        """Value of an attribute, None if it is absent. Raises ModelError for one that refers to a function's."""
        found = self.node.attributes.get(name)
        if found is None:
            return None
        if found.is_ref():
            raise ModelError(f"{self.where} takes its {name!r} from a function; inline functions first")
        return found.value

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        found = self.attr(name)
        return default if found is None else int(found)

    def real(self, name: str, default: float) -> float:
        """A float attribute."""
        found = self.attr(name)
        return default if found is None else float(found)

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        found = self.attr(name)
        return default if found is None else str(found)

    def integers(self, name: str) -> list[int] | None:
        """An attribute of integers; None if it is absent."""
        found = self.attr(name)
        return None if found is None else [int(v) for v in found]

    @property
    def where(self) -> str:
        """Operator and node, for messages."""
        return describe(self.node)


def describe(node: ir.Node) -> str:
    """Operator and node in words; nodes without a name by their output."""
    domain = "" if node.domain in _STANDARD else f"{node.domain}::"
    label = node.name or next((o.name for o in node.outputs if o.name), "")
    return f"{domain}{node.op_type} {label!r}"


def ints(tensor: Tensor) -> list[int]:
    """A tensor of any shape as a flat list of integers."""
    return [int(v) for v in tensor.reshape(-1).tolist()]


@dataclass(frozen=True)
class Operator:
    """One form of an operator: `build` makes its kernel; it holds from opset `since` on.

    `gradient`: "exact" agrees with finite differences; "straight-through" with those of a stated smooth stand-in;
    "none" has no derivative worth having (integers, truth values, indices).
    """

    op_type: str
    domain: str
    since: int
    gradient: Gradient
    build: Callable[[Call], Kernel]


_REGISTRY: dict[tuple[str, str], list[Operator]] = {}


def operator(
    *op_types: str, since: int = 1, domain: str = "", gradient: Gradient = "exact"
) -> Callable[[Callable[[Call], Kernel]], Callable[[Call], Kernel]]:
    """Register the decorated builder. Raises ValueError when that operator is registered for that opset already."""

    def register(build: Callable[[Call], Kernel]) -> Callable[[Call], Kernel]:
        for op_type in op_types:
            forms = _REGISTRY.setdefault((domain, op_type), [])
            if any(f.since == since for f in forms):
                raise ValueError(f"{op_type} since opset {since} must be registered once, but it is there already")
            forms.append(Operator(op_type, domain, since, gradient, build))
            forms.sort(key=lambda f: f.since)
        return build

    return register


def find(node: ir.Node, opset: int) -> Operator | None:
    """The form of a node's operator that holds at `opset`; None if there is none."""
    domain = "" if node.domain in _STANDARD else node.domain
    found = None
    for form in _REGISTRY.get((domain, node.op_type), ()):
        if form.since <= opset or domain:
            found = form
    return found


def operators() -> Sequence[Operator]:
    """Every registered form."""
    return [form for forms in _REGISTRY.values() for form in forms]

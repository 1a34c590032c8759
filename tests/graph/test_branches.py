"""Residual branches are found by what is added to what, and hold exactly what nothing else needs."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from featherweight.graph import branches


def model(body: str, *, outputs: str = "float[2, 4] y", **weights: tuple[int, ...]) -> ir.Model:
    made = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21]> g (float[2, 4] x, float[2, 4] z) => ({outputs}) {{ {body} }}'
        )
    )
    for name, shape in weights.items():
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.Tensor(np.ones(shape, np.float32), name=name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        made.graph.register_initializer(value)
    return made


def found(made: ir.Model) -> dict[str, tuple[list[str], list[str]]]:
    return {
        b.name: ([n.name or "" for n in b.nodes], [t.name or "" for t in b.tensors]) for b in branches.residual(made)
    }


def test_either_side_of_the_sum_may_be_the_skip():
    made = model("[a] h = MatMul(x, w) [s] t = Add(h, x) [b] g = MatMul(t, v) [r] u = Add(t, g) [o] y = Relu(u)",
                 w=(4, 4), v=(4, 4))  # fmt: skip
    assert found(made) == {"branch into s": (["a", "s"], ["w"]), "branch into r": (["b", "r"], ["v"])}


def test_nested_branches_are_found_each_for_itself():
    made = model(
        "[a] h = MatMul(x, w) [b] g = MatMul(h, v) [s] t = Add(h, g) [r] u = Add(x, t) [o] y = Relu(u)",
        w=(4, 4), v=(4, 4),
    )  # fmt: skip
    assert found(made) == {"branch into s": (["b", "s"], ["v"]), "branch into r": (["a", "b", "s", "r"], ["w", "v"])}


def test_what_something_else_reads_stays():
    made = model(
        "[a] h = MatMul(x, w) [b] g = MatMul(h, v) [s] t = Add(x, g) [o] y = Add(t, h)", w=(4, 4), v=(4, 4)
    )  # fmt: skip
    assert found(made) == {"branch into s": (["b", "s"], ["v"])} or found(made) == {}


@pytest.mark.parametrize(
    ("body", "weights", "why"),
    [
        ("[a] h = MatMul(x, w) [s] t = Add(h, z) [o] y = Relu(t)", {"w": (4, 4)}, "z is no part of what makes h"),
        ("[a] h = Relu(x) [s] t = Add(h, x) [o] y = Relu(t)", {}, "nothing is stored in the branch"),
        ("[a] h = MatMul(x, w) [s] y = Add(h, x)", {"w": (4, 4)}, "the sum is an output"),
        ("[a] h = MatMul(x, w) [s] t = Add(h, b) [o] y = Relu(t)", {"w": (4, 4), "b": (4,)}, "a bias is no skip"),
        ("[m] q = ReduceMean<keepdims = 1>(x, k) [a] h = MatMul(x, w) [s] t = Add(q, h) [o] y = Relu(t)",
         {"w": (4, 4)}, "a sum with broadcasting has another shape than its skip"),
        ("[a] h = Sub(x, w) [s] t = Add(x, x) [r] u = Add(t, h) [o] y = Relu(u)", {"w": (4,)}, "t is not read by h"),
    ],
)  # fmt: skip
def test_what_is_no_branch(body: str, weights: dict[str, tuple[int, ...]], why: str):
    made = model(body, **weights)
    if "ReduceMean" in body:
        value = next(v for n in made.graph for v in n.inputs if v is not None and v.name == "k")
        value.const_value = ir.Tensor(np.array([1]), name="k")
        made.graph.register_initializer(value)
    assert found(made) == {}, why


def test_a_branch_inside_of_which_is_an_output_keeps_that():
    made = model(
        "[a] h = MatMul(x, w) [b] g = MatMul(h, v) [s] t = Add(x, g) [o] y = Relu(t)",
        outputs="float[2, 4] y, float[2, 4] h", w=(4, 4), v=(4, 4),
    )  # fmt: skip
    assert found(made) == {}

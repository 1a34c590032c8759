"""Which programs inside a `.pt2` file are safe to load.

`torch.export.load` trusts its file: symbolic shapes are strings given to an evaluator (`sympy.sympify`), an operator
may be any attribute under the module `torch` (through which all of Python can be reached), guards are Python source,
and names become lines of generated code. So the program is read here first as plain JSON, and only what a program of
tensor operators needs is let through: operators of the dispatcher, arithmetic of a closed list, names of letters.

What runs nothing but says much about whoever exported (stack traces with paths, module names) is dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from featherweight.errors import ModelError

MAX_DEPTH = 60
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,400}")
_DOTTED = re.compile(r"[A-Za-z0-9_.\-]{0,1000}")
_WORDS = re.compile(r"[A-Za-z0-9_ ,.>+\-]{0,400}")
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_HIGHER = re.compile(r"torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast|while_loop|scan)")
# Operators that reach beyond tensors.
_REFUSED_OPERATORS = {"from_file", "save", "load", "_load_for_executorch", "backward"}
_BITWISE = {"__and__", "__or__", "__xor__", "__lshift__", "__rshift__"}
_ARITHMETIC = {
    *(f"_operator.{n}" for n in "add sub mul floordiv truediv mod pow neg pos eq ne lt le gt ge and_ or_".split()),  # noqa: SIM905
    *(f"math.{n}" for n in ("ceil", "floor", "trunc", "sqrt")),
    *(f"torch.sym_{n}" for n in ("int", "float", "max", "min", "not", "ite", "sum", "sqrt")),
    "_operator.getitem",
    "torch._sym_sqrt",
}
_SYMBOLIC = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "Eq", "Ne", "Equality",
    "Unequality", "Gt", "Ge", "Lt", "Le", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "And", "Or",
    "Not", "floor", "ceiling", "true", "false", "oo", "int_oo", "True", "False", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat",
    "Identity",
}  # fmt: skip
_SYMBOL_NAME = re.compile(r"[a-z]{1,4}[0-9]{1,9}")
_ASSUMPTIONS = {"positive", "nonnegative", "integer", "real", "negative", "zero", "finite"}
_SYNTAX = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd,
    ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_CONTAINERS = {
    None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict",
}  # fmt: skip
_DROPPED = {"metadata": dict, "guards_code": list, "treespec_namedtuple_fields": dict}
_NAMES_OF_PARTS = {
    "parameter_name", "buffer_name", "tensor_constant_name", "buffer_to_mutate", "buffer_mutated_name", "fqn",
    "torch_version", "class_fqn",
}  # fmt: skip


def checked_program(text: bytes, where: str) -> dict[str, Any]:
    """The program's JSON without what is not needed to run it. Raises ModelError for whatever is not on the list."""
    try:
        program = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{where} is corrupt: its program is not JSON ({e}); save it again") from e
    if not isinstance(program, dict):
        raise ModelError(f"{where} is corrupt: its program is not a JSON object; save it again")
    return dict(_checked(program, "", where, 0))


def _checked(value: Any, key: str, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ModelError(f"{where} is nested deeper than {MAX_DEPTH}; it is corrupt or made to harm")
    if isinstance(value, dict):
        found = {}
        for k, v in value.items():
            if k in _DROPPED:
                found[k] = _DROPPED[k]()
                continue
            if not _DOTTED.fullmatch(k):
                raise _refused(where, "a key", k)
            found[k] = _checked(v, k, where, depth + 1)
        return found
    if isinstance(value, list):
        return [_checked(v, key, where, depth + 1) for v in value]
    if isinstance(value, str):
        _check_text(value, key, where)
    elif key == "as_custom_obj":
        raise _refused(where, "a custom object", value)
    return value


def _check_text(text: str, key: str, where: str) -> None:
    if key in ("target", "as_operator"):
        _check_operator(text, where)
    elif key == "expr_str":
        _check_expression(text, where)
    elif key in ("in_spec", "out_spec"):
        _check_tree(text, where)
    elif key in _NAMES_OF_PARTS or key == "verifiers":
        if not _DOTTED.fullmatch(text.replace("+", "")):
            raise _refused(where, f"the {key}", text)
    elif key in ("as_string", "as_strings"):  # an equation, a mode
        if not _WORDS.fullmatch(text):
            raise _refused(where, "a text argument", text)
    elif text and not _NAME.fullmatch(text):
        raise _refused(where, f"the name in {key!r}", text)


def _check_operator(text: str, where: str) -> None:
    if text in _ARITHMETIC or _HIGHER.fullmatch(text):
        return
    found = _OPERATOR.fullmatch(text)
    hidden = found is not None and (found[3].startswith("__") or (found[2][:2] == "__" and found[2] not in _BITWISE))
    if found is None or found[2] in _REFUSED_OPERATORS or hidden:
        raise _refused(where, "the operator", text)


def _check_expression(text: str, where: str) -> None:
    """Arithmetic on symbols like s0, written as an expression or as sympy writes it out; small, and nothing else."""
    if len(text) > 2000:
        raise _refused(where, "the shape expression", text)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise _refused(where, "the shape expression", text) from e
    for node in ast.walk(tree):
        if not isinstance(node, _SYNTAX) or not _is_plain(node):
            raise _refused(where, "the shape expression", text)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _SYMBOLIC or _SYMBOL_NAME.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SYMBOLIC and not _is_tower(node)
    if isinstance(node, ast.keyword):
        return node.arg in _ASSUMPTIONS and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _SYMBOL_NAME.fullmatch(node.value) is not None
        return node.value is None or (isinstance(node.value, bool | int | float) and abs(node.value) < 2**63)
    return True


def _is_tower(call: ast.Call) -> bool:
    """True for a power whose exponent is not a small number."""
    power = isinstance(call.func, ast.Name) and "Pow" in call.func.id
    return power and not (len(call.args) == 2 and _is_small(call.args[1]))


def _is_small(node: ast.AST) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "Integer" and inner.args:
        return len(inner.args) == 1 and _is_small(inner.args[0])
    return isinstance(inner, ast.Constant) and isinstance(inner.value, int | float) and abs(inner.value) <= 16


def _check_tree(text: str, where: str) -> None:
    """How arguments are nested: plain containers, with text as keys."""
    if not text:
        return
    try:
        found = json.loads(text)
        nodes = list(_tree_nodes(found[1], 0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise _refused(where, "the nesting of arguments", text) from e
    for kind, context in nodes:
        if kind not in _CONTAINERS:
            raise _refused(where, "the argument type", str(kind))
        if not _is_keys(context):
            raise _refused(where, "the argument keys", str(context))


def _tree_nodes(node: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    yield node["type"], node["context"]
    for child in node["children_spec"]:
        yield from _tree_nodes(child, depth + 1)


def _is_keys(context: Any) -> bool:
    if context is None or context == "null":
        return True
    keys = json.loads(context) if isinstance(context, str) else context
    return isinstance(keys, list) and all(
        isinstance(k, int) or (isinstance(k, str) and _DOTTED.fullmatch(k)) for k in keys
    )


def _refused(where: str, what: str, text: object) -> ModelError:
    shown = str(text)[:120]
    return ModelError(
        f"{where} is not loaded: {what} {shown!r} is not among what a program of tensor operators needs, and loading "
        "it could run code; export the module again, or say --trust (trust=True in Python) if you trust its maker"
    )

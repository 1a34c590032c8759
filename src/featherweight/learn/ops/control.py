"""If, Loop and Scan: bodies are executed as they are reached, so gradients pass through the steps that ran."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, operator


@operator("If")
def branch(call: Call) -> Kernel:
    """One of two bodies."""
    then, other = call.bodies["then_branch"], call.bodies["else_branch"]
    return lambda condition, *outside: tuple((then if bool(condition) else other)([], outside))


@operator("Loop")
def loop(call: Call) -> Kernel:
    """A body until its condition fails or the count is reached; carried values, then stacked ones."""
    body = call.bodies["body"]
    carried = len(call.node.inputs) - 2
    stacked = len(body.outputs) - 1 - carried

    def run(count: Tensor | None, condition: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        state, outside = list(rest[:carried]), rest[carried:]
        limit = None if count is None else int(count.reshape(()).item())
        go, i = condition is None or bool(condition), 0
        rows: list[list[Tensor]] = [[] for _ in range(stacked)]
        while go and (limit is None or i < limit):
            results = body([torch.tensor(i), torch.tensor(True), *state], outside)
            go, state = bool(results[0]), results[1 : 1 + carried]
            for row, value in zip(rows, results[1 + carried :], strict=True):
                row.append(value)
            i += 1
        if not i and stacked:
            raise ModelError(f"{call.where}: a loop without a turn has no values to stack")
        return (*state, *(torch.stack(row) for row in rows))

    return run


@operator("Scan", since=9)
def scan(call: Call) -> Kernel:
    """A body over slices of its inputs, forwards or backwards, along any axis."""
    body, n = call.bodies["body"], call.integer("num_scan_inputs", 1)
    carried = len(call.node.inputs) - n
    stacked = len(body.outputs) - carried
    in_axes, out_axes = call.integers("scan_input_axes") or [0] * n, call.integers("scan_output_axes") or [0] * stacked
    in_back = call.integers("scan_input_directions") or [0] * n
    out_back = call.integers("scan_output_directions") or [0] * stacked

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        state, inputs, outside = list(given[:carried]), given[carried : carried + n], given[carried + n :]
        slices = [x.unbind(axis) for x, axis in zip(inputs, in_axes, strict=True)]
        slices = [s[::-1] if back else s for s, back in zip(slices, in_back, strict=True)]
        rows: list[list[Tensor]] = [[] for _ in range(stacked)]
        for parts in zip(*slices, strict=True):
            results = body([*state, *parts], outside)
            state = results[:carried]
            for row, value in zip(rows, results[carried:], strict=True):
                row.append(value)
        if stacked and not rows[0]:
            raise ModelError(f"{call.where}: a scan of nothing has no values to stack")
        outputs = [
            torch.stack(row[::-1] if back else row, axis)
            for row, back, axis in zip(rows, out_back, out_axes, strict=True)
        ]
        return (*state, *outputs)

    return run

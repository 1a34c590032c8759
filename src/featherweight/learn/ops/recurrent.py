"""LSTM, GRU and RNN, both directions, with sequence lengths, initial states and peepholes.

torch's fused recurrence is used where it computes the same (tanh and sigmoid, no lengths, no clipping); its gates are
in another order, so weights are regathered, through which gradients pass. Everything else is stepped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, operator

Activation = Callable[[Tensor], Tensor]
_PLAIN: dict[str, Activation] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softsign": functional.softsign, "softplus": functional.softplus,
}  # fmt: skip
_SHAPED: dict[str, tuple[int, tuple[float, float], Callable[[Tensor, float, float], Tensor]]] = {
    "affine": (2, (1.0, 0.0), lambda x, a, b: a * x + b),
    "leakyrelu": (1, (0.01, 0.0), lambda x, a, _: functional.leaky_relu(x, a)),
    "thresholdedrelu": (1, (1.0, 0.0), lambda x, a, _: torch.where(x > a, x, torch.zeros_like(x))),
    "scaledtanh": (2, (1.0, 1.0), lambda x, a, b: a * torch.tanh(b * x)),
    "hardsigmoid": (2, (0.2, 0.5), lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0)),
    "elu": (1, (1.0, 0.0), lambda x, a, _: functional.elu(x, a)),
}
"""How many of alpha and beta each takes, what they are by default, and the function."""
_DEFAULTS = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


@dataclass
class _Cell:
    """One direction: its weights and what a step needs."""

    w: Tensor
    r: Tensor
    b: Tensor
    peep: Tensor | None
    functions: list[Activation]
    clip: float | None
    linear_before_reset: bool

    def _cut(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Gates in the order i, o, f, c; `x` is already multiplied by w."""
        n = self.r.shape[1]
        gates = x + functional.linear(h, self.r, self.b[4 * n :])
        i, o, f, g = torch.split(gates, n, -1)
        p = (None, None, None) if self.peep is None else torch.split(self.peep, n, -1)  # in the order i, o, f
        i = i if p[0] is None else i + p[0] * c
        f = f if p[2] is None else f + p[2] * c
        new = self.functions[0](self._cut(f)) * c + self.functions[0](self._cut(i)) * self.functions[1](self._cut(g))
        o = o if p[1] is None else o + p[1] * new
        return self.functions[0](self._cut(o)) * self.functions[2](new), new

    def gru(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Gates in the order z, r, h."""
        n = self.r.shape[1]
        zx, rx, hx = torch.split(x, n, -1)
        zr, rr, hr = torch.split(self.r, n, 0)
        zb, rb, hb = torch.split(self.b[3 * n :], n, -1)
        z = self.functions[0](self._cut(zx + functional.linear(h, zr, zb)))
        r = self.functions[0](self._cut(rx + functional.linear(h, rr, rb)))
        if self.linear_before_reset:
            inner = hx + r * functional.linear(h, hr, hb)
        else:
            inner = hx + functional.linear(r * h, hr, hb)
        return (1 - z) * self.functions[1](self._cut(inner)) + z * h, c

    def rnn(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """One gate."""
        n = self.r.shape[1]
        return self.functions[0](self._cut(x + functional.linear(h, self.r, self.b[n:]))), c


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _stepped(
    step: Step, cell: _Cell, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one direction: (time, batch, hidden), last h, last c. Past its length a sample gives 0."""
    time = x.shape[0]
    inputs = functional.linear(x, cell.w, cell.b[: cell.w.shape[0]])
    outputs: list[Tensor] = [h] * time
    for t in reversed(range(time)) if backward else range(time):
        new_h, new_c = step(inputs[t], h, c)
        if lengths is not None:
            live = (t < lengths)[:, None]
            h, c = torch.where(live, new_h, h), torch.where(live, new_c, c)
            outputs[t] = torch.where(live, new_h, torch.zeros_like(new_h))
        else:
            h, c = new_h, new_c
            outputs[t] = new_h
    if not time:
        return x.new_zeros((0, *h.shape)), h, c
    return torch.stack(outputs), h, c


class _Recurrent:
    """Attributes of one node, and its kernel."""

    def __init__(self, call: Call) -> None:
        self.op = call.node.op_type
        self.gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[self.op]
        self.direction = call.text("direction", "forward")
        self.directions = 2 if self.direction == "bidirectional" else 1
        self.clip = call.attr("clip")
        self.linear_before_reset = bool(call.integer("linear_before_reset", 0))
        self.batch_first = bool(call.integer("layout", 0))
        names = call.attr("activations")
        self.named = [str(n).lower() for n in names] if names else _DEFAULTS[self.op] * self.directions
        unknown = [n for n in self.named if n not in _PLAIN and n not in _SHAPED]
        if unknown or call.integer("input_forget", 0):
            raise ModelError(f"{call.where}: {unknown or 'coupled input and forget gates'} not known here")
        self.functions = _functions(self.named, call.attr("activation_alpha"), call.attr("activation_beta"))
        plain = self.named == _DEFAULTS[self.op] * self.directions and self.clip is None
        self.fusable = plain and (self.op != "GRU" or self.linear_before_reset)

    def __call__(
        self, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
        h: Tensor | None = None, c: Tensor | None = None, peep: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if self.batch_first:
            x = x.transpose(0, 1)
            h, c = (None if s is None else s.transpose(0, 1) for s in (h, c))
        batch, hidden = x.shape[1], r.shape[2]
        zeros = x.new_zeros((self.directions, batch, hidden))
        h, c = (zeros if s is None else s for s in (h, c))
        bias = x.new_zeros((self.directions, 2 * self.gates * hidden)) if b is None else b
        if lengths is not None and bool((lengths >= x.shape[0]).all()):
            lengths = None
        if self.fusable and lengths is None and peep is None and x.shape[0]:
            y, last_h, last_c = self._fused(x, w, r, bias, h, c)
        else:
            y, last_h, last_c = self._by_step(x, w, r, bias, lengths, h, c, peep)
        if self.batch_first:
            y, last_h, last_c = y.permute(2, 0, 1, 3), last_h.transpose(0, 1), last_c.transpose(0, 1)
        return (y, last_h, last_c) if self.op == "LSTM" else (y, last_h)

    def _by_step(
        self, x: Tensor, w: Tensor, r: Tensor, b: Tensor, lengths: Tensor | None, h: Tensor, c: Tensor,
        peep: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ys, hs, cs = [], [], []
        per = len(self.functions) // self.directions
        for d in range(self.directions):
            functions = self.functions[d * per : (d + 1) * per]
            cell = _Cell(w[d], r[d], b[d], None if peep is None else peep[d], functions, self.clip,
                         self.linear_before_reset)  # fmt: skip
            step: Step = getattr(cell, self.op.lower())
            backward = self.direction == "reverse" or d == 1
            y, last_h, last_c = _stepped(step, cell, x, h[d], c[d], lengths, backward)
            ys.append(y)
            hs.append(last_h)
            cs.append(last_c)
        return torch.stack(ys, 1), torch.stack(hs), torch.stack(cs)

    def _fused(self, x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat: list[Tensor] = []
        for d in range(self.directions):
            wb, rb = b[d].chunk(2)
            flat += [self._gates(t) for t in (w[d], r[d], wb, rb)]
        reverse = self.direction == "reverse"
        x = x.flip(0) if reverse else x
        both = self.directions == 2
        if self.op == "LSTM":
            y, last_h, last_c = torch.lstm(x, (h, c), flat, True, 1, 0.0, False, both, False)
        else:
            run = torch.gru if self.op == "GRU" else torch.rnn_tanh
            y, last_h = run(x, h, flat, True, 1, 0.0, False, both, False)
            last_c = c
        y = y.reshape(y.shape[0], y.shape[1], self.directions, -1).transpose(1, 2)
        return (y.flip(0) if reverse else y), last_h, last_c

    def _gates(self, t: Tensor) -> Tensor:
        """From the order of ONNX to that of torch: i o f c -> i f c o; z r h -> r z h."""
        if self.op == "RNN":
            return t
        parts = t.chunk(self.gates)
        order = (0, 2, 3, 1) if self.op == "LSTM" else (1, 0, 2)
        return torch.cat([parts[i] for i in order])


def _functions(names: list[str], alphas: object, betas: object) -> list[Activation]:
    """Each activation with its own alpha and beta, which are listed only for those that have them."""
    lists = [list(v) if isinstance(v, (list, tuple)) else [] for v in (alphas, betas)]
    found = []
    for name in names:
        if name in _PLAIN:
            found.append(_PLAIN[name])
            continue
        takes, defaults, function = _SHAPED[name]
        values = [float(lists[i].pop(0)) if i < takes and lists[i] else defaults[i] for i in (0, 1)]
        found.append(_with(function, *values))
    return found


def _with(function: Callable[[Tensor, float, float], Tensor], a: float, b: float) -> Activation:
    return lambda x: function(x, a, b)


@operator("LSTM")
def lstm(call: Call) -> Kernel:
    """Long short-term memory."""
    return _Recurrent(call)


@operator("GRU")
def gru(call: Call) -> Kernel:
    """Gated recurrent unit."""
    return _Recurrent(call)


@operator("RNN")
def rnn(call: Call) -> Kernel:
    """Plain recurrence."""
    return _Recurrent(call)

"""Exporters explain at length; this finds the one line that says what to change."""

from __future__ import annotations

import re
import traceback

_ANSI = re.compile(r"\x1b\[[0-9;]*m|\[\d+m")
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)\n\s+(.+)')
_NOT_USER = ("/torch/", "/site-packages/", "featherweight/convert", "<eval_with_key>", "<string>", "/lib/python")


def cause(error: BaseException) -> str:
    """What stands in the way, with the user's line where there is one."""
    text = _ANSI.sub("", "\n".join(str(e) for e in _chain(error)))
    place = _place(error, text)
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return (
            f"its control flow depends on the values of tensors{place}; use torch.where or torch.cond, or take the "
            "decision outside of the module"
        )
    operator = _OPERATOR.search(text)
    if operator:
        return f"there is no ONNX form of the operator {operator[1]}{place}; compute it from others, or outside"
    if ".numpy()" in text or "tensor subclasses" in text:
        return f"it leaves PyTorch in the middle of its computation{place}; use tensor operations only"
    return f"{first_line(_deepest(error))}{place}"


def first_line(error: BaseException) -> str:
    """The first line of a message, at most 300 characters."""
    text = _ANSI.sub("", str(error)).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in found and len(found) < 8:
        found.append(now)
        now = now.__cause__ or now.__context__
    return found


def _deepest(error: BaseException) -> BaseException:
    """The exporter's own errors say which step failed; their cause says why."""
    explained = [e for e in _chain(error) if "onnx._internal" not in type(e).__module__]
    return explained[0] if explained else error


def _place(error: BaseException, text: str) -> str:
    """` (file.py, line 8: if x.sum() > 0:)`, or nothing where no line of the user's own is known."""
    own = [m for m in _PLACE.findall(text) if not _is_library(m[0])]
    if own:
        file, line, _, code = own[-1]
        return f" ({file.rpartition('/')[2]}, line {line}: {code.strip()[:120]})"
    for e in _chain(error):
        frames = [
            f for f in traceback.extract_tb(e.__traceback__) if not _is_library(f.filename) and f.name == "forward"
        ]
        if frames:
            last = frames[-1]
            return f" ({last.filename.rpartition('/')[2]}, line {last.lineno}: {(last.line or '')[:120]})"
    return ""


def _is_library(file: str) -> bool:
    return any(part in file for part in _NOT_USER)

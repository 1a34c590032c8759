"""The one way in: whatever a model is given as, an ONNX file comes out, checked against its source."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.convert import extras, formats
from featherweight.core import Note, Progress, Silent
from featherweight.errors import DataError, ModelError

if TYPE_CHECKING:
    from featherweight.convert.export import Source


@dataclass(frozen=True)
class Converted:
    """The ONNX file and how far its outputs are from the source's.

    `largest_difference` is absolute, over all float outputs and all `sizes` tried (by axis name); `tokenizer` is the
    tokenizer.json that came with the source, if any.
    """

    path: Path
    source: str
    largest_difference: float
    sizes: tuple[Mapping[str, int], ...] = ()
    notes: tuple[Note, ...] = ()
    tokenizer: Path | None = None

    @property
    def line(self) -> str:
        """One line for a report."""
        tried = " and ".join(", ".join(f"{k} {v}" for k, v in s.items()) for s in self.sizes if s)
        return f"converted from {self.source}: largest difference {self.largest_difference:.1g}" + (
            f" ({tried})" if tried else ""
        )


def is_convertible(source: Any) -> bool:
    """True for a module, an exported program, and the path of a `.pt2`, a pickled file or a Hugging Face folder.

    Raises ModelError for a path whose format another tool must convert, naming the tool.
    """
    if isinstance(source, str | Path):
        return formats.kind_of(Path(source)) != "onnx"
    return _torch_kind(source) != ""


def to_onnx(
    source: Any,
    out: str | Path,
    *,
    example_inputs: Any = None,
    dynamic: Any = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Convert and check.

    Args:
        source: torch.nn.Module (taken in eval mode, its mode is put back), torch.export.ExportedProgram, a `.pt2` file,
            a Hugging Face folder (config.json with safetensors), or with `trust` a pickled torch.nn.Module.
        out: the ONNX file to write; beyond 1.5 GB its weights go to a file beside it.
        example_inputs: what the module takes: a tensor or array, a sequence of them, or a mapping by the names of
            `forward`'s parameters. A program has its own; a Hugging Face folder needs none.
        dynamic: axes to leave open, {input: {axis: name}} or {input: [axis, ...]}; None: batch and sequence where the
            module allows them; False: none.
        trust: allow what can run code from the file (pickles); never from the network.
        progress: where the steps are told.

    Raises:
        MissingExtraError: torch, onnxscript or transformers is not installed.
        ModelError: the source cannot be exported, with the cause; or an output differs from the source's.
        DataError: the example inputs are missing or do not fit.
        OutputError: `out` cannot be written.
    """
    shown = progress or Silent()
    shown.start("converting to ONNX")
    found = _source(source, example_inputs, trust=trust)
    from featherweight.convert.export import convert

    with _inference(found.module):
        check, notes = convert(found, Path(out), dynamic)
    tokenizer = Path(source).resolve() / "tokenizer.json" if isinstance(source, str | Path) else None
    return Converted(
        Path(out), found.label, check.largest, check.sizes, notes,
        tokenizer if tokenizer is not None and tokenizer.is_file() else None,
    )  # fmt: skip


def _source(source: Any, examples: Any, *, trust: bool) -> Source:
    if isinstance(source, str | Path):
        return _from_path(Path(source), examples, trust=trust)
    kind = _torch_kind(source)
    if not kind:
        raise ModelError(
            "a model must be a path, a torch.nn.Module or a torch.export.ExportedProgram, but got "
            f"{type(source).__name__}"
        )
    extras.need_torch("converting a PyTorch model")
    from featherweight.convert import modules

    if kind == "program":
        return modules.from_program(source, examples, label="the exported program")
    return modules.from_module(source, examples)


def _from_path(path: Path, examples: Any, *, trust: bool) -> Source:
    kind = formats.kind_of(path)
    if not path.exists():
        raise ModelError(f"there is no file or folder {str(path)!r}")
    if kind == "onnx":
        raise ModelError(f"{path} is not converted: it is neither .pt2 nor a Hugging Face folder; is it ONNX already?")
    if kind == "pickle" and not trust:
        raise ModelError(formats.pickle_refusal(path))
    if kind == "folder":
        from featherweight.convert import huggingface

        if examples is not None:
            raise DataError(f"{path} is a Hugging Face folder, which needs no example inputs; leave them out")
        return huggingface.from_folder(path)
    extras.need_torch(f"reading {path.name}")
    from featherweight.convert import archive, modules

    if kind == "pickle":
        return modules.from_pickle(path, examples)
    return modules.from_program(archive.open_program(path, trust=trust), examples, label=path.name)


def _torch_kind(source: Any) -> str:
    """`module`, `program` or ``; torch is loaded already if `source` is one of them."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    if isinstance(source, torch.nn.Module):
        return "module"
    return "program" if isinstance(source, torch.export.ExportedProgram) else ""


class _inference:  # noqa: N801  # used like a function
    """A module in eval mode for a while; each part's own mode is put back."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._modes: list[tuple[Any, bool]] = []

    def __enter__(self) -> None:
        if self._module is not None:
            self._modes = [(m, m.training) for m in self._module.modules()]
            self._module.eval()

    def __exit__(self, *_: object) -> None:
        for part, mode in self._modes:
            part.training = mode

"""`featherweight convert`: a PyTorch program or a Hugging Face folder becomes ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress
from featherweight.cli._sections import Command, option
from featherweight.errors import DataError, ModelError


@click.command(cls=Command, short_help="Make ONNX of a .pt2 file or a Hugging Face folder.")
@click.argument("source", type=options.PATH)
@option("-o", "--out", required=True, type=options.PATH, metavar="FILE", help="The ONNX file to write.")
@option("--fixed", is_flag=True, help="Leave no axis open: the sizes of the example inputs.")
@option("--example", type=options.PATH, metavar="FILE", section="Data",
        help="An .npz with an array for each parameter of forward: what a pickled module is run on.")  # fmt: skip
@options.trust_option
@common
def command(source: Path, *, out: Path, fixed: bool, example: Path | None, trust: bool) -> Output:
    """Make ONNX of a program of torch.export (.pt2) or a local Hugging Face folder, and check it against its source.

    \b
    featherweight convert model.pt2 -o model.onnx
    featherweight convert bert-folder/ -o bert.onnx
    """
    from featherweight.convert import convert_file, is_convertible
    from featherweight.convert.formats import kind_of
    from featherweight.graph import io

    if not is_convertible(source):
        what = "is ONNX already" if source.suffix.lower() == ".onnx" else "is neither .pt2 nor a Hugging Face folder"
        raise ModelError(f"{source} {what if source.exists() else 'is not there'}; give a .pt2 file or such a folder")
    if example is not None and kind_of(source) != "pickle":
        raise ModelError(f"--example is for pickled modules; {source} says itself what it takes, so leave it out")
    if example is not None and not (example.is_file() and example.suffix.lower() == ".npz"):
        raise DataError(f"--example must be an .npz file that exists, but got {example}")
    with progress() as shown:
        found = convert_file(source, out, trust=trust, dynamic=False if fixed else None, data=example, progress=shown)
    size = io.size_bytes(out)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("converted", {**plain(found), "size_bytes": size})

    def parts() -> list[Any]:
        from rich.text import Text

        from featherweight.quantities import format_bytes

        lines = [f"{found.path}: {format_bytes(size)}", found.line, *(f"{n.where}: {n.text}" for n in found.notes)]
        return [Text(line) for line in lines]

    return Output(as_json, parts)

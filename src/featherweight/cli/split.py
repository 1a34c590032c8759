"""`featherweight split`: cut a model in a head and a tail, or list where it can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Cut a model in head and tail.")
@options.model_argument
@option("--list", "listed", is_flag=True, help="Show the cuts: bytes on the wire, MACs of each side.")
@option("--at", "cut", metavar="TENSOR|N|auto", help="Where: a tensor (a,b for two), a number of --list, or auto.")
@option("-o", "--out", type=options.PATH, metavar="DIR", help="Folder for head.onnx, tail.onnx and split.json.")
@option("--shape", "shapes", multiple=True, metavar="NAME=2x3x224x224", section="Data", help="Size of an input's axes.")
@option("--check/--no-check", default=True, help="Run both halves and the whole on random inputs and compare.")
@options.all_layers_option
@common
def command(
    model: Path, *, listed: bool, cut: str | None, out: Path | None, shapes: tuple[str, ...], check: bool,
    all_layers: bool,
) -> Output:  # fmt: skip
    """Cut a model in a head and a tail that, run one after the other, equal the whole.

    \b
    featherweight split lite0.onnx --list
    featherweight split lite0.onnx --at 41 -o halves/
    featherweight split minilm.onnx --at auto --shape input_ids=1x64 -o halves/
    """
    if listed == (cut is not None):
        raise click.UsageError("give either --list or --at TENSOR|N|auto")
    sizes = read_shapes(shapes)
    if listed:
        return _list(model, sizes, everything=all_layers)
    if out is None:
        raise click.UsageError("--at writes files: name their folder with -o DIR")
    return _split(model, str(cut), out, sizes, check=check)


def read_shapes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by input name of 'name=2x3x4'. Raises click.UsageError."""
    found = {}
    for text in texts:
        name, _, dims = text.rpartition("=")
        sizes = [d for d in dims.lower().split("x") if d]
        if not name or not all(d.isdecimal() and 0 < int(d) < 1 << 31 for d in sizes):
            raise click.UsageError(f"a shape is written like input_ids=1x64, with sizes above 0, but got {text!r}")
        found[name] = tuple(int(d) for d in sizes)
    return found


def _list(model: Path, sizes: dict[str, tuple[int, ...]], *, everything: bool) -> Output:
    from featherweight.edge.listing import list_cuts

    found = list_cuts(model, input_shapes=sizes)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("cuts", plain(found))

    def parts() -> list[Any]:
        from featherweight.report.placement import cut_parts

        return list(cut_parts(found, everything=everything))

    return Output(as_json, parts)


def _split(model: Path, cut: str, out: Path, sizes: dict[str, tuple[int, ...]], *, check: bool) -> Output:
    from featherweight.edge.listing import compare_halves
    from featherweight.edge.split import split

    where = int(cut) if cut.isdecimal() else cut if "," not in cut else tuple(n.strip() for n in cut.split(","))
    made = split(model, where, out, input_shapes=sizes)
    difference = compare_halves(model, made, input_shapes=sizes) if check else None

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("split", {**plain(made), "check": plain(difference)})

    def parts() -> list[Any]:
        from featherweight.report.placement import split_parts

        return list(split_parts(made, difference))

    return Output(as_json, parts)

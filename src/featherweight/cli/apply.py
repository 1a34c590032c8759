"""`featherweight apply`: replay a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Replay a plan: the same bytes.")
@options.model_argument
@click.argument("plan", type=options.PATH)
@option("--statistics", type=options.PATH, metavar="FILE", section="Data", help="Default: beside the plan.")
@option("-o", "--out", required=True, type=options.PATH, metavar="FILE", help="The model to write.")
@common
def command(model: Path, plan: Path, *, statistics: Path | None, out: Path) -> Output:
    """Build the model of a plan again without a search: the same bytes.

    \b
    featherweight apply lite0.onnx run/plan.json -o again.onnx
    """
    from featherweight.graph import io
    from featherweight.pipeline import apply

    written = Path(apply(model, plan, out=out, statistics=statistics))
    size = io.size_bytes(written)

    def as_json() -> str:
        from featherweight.report.json import document

        return document("applied", {"path": written, "size_bytes": size})

    def parts() -> list[Any]:
        from rich.text import Text

        from featherweight.quantities import format_bytes

        return [Text(f"{written}: {format_bytes(size)}", no_wrap=True)]

    return Output(as_json, parts)

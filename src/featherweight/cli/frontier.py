"""`featherweight frontier`: the trade-off of size against drop, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import MET, NOT_MET, Output, common, progress, written_parts
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Measure size against drop.")
@options.model_argument
@options.data_option
@option(
    "--points",
    type=click.IntRange(min=2),
    metavar="N",
    default=8,
    show_default=True,
    section="Search",
    help="Sizes to try.",
)
@options.budget_options
@options.search_options
@option("-o", "--out", required=True, type=options.PATH, metavar="RUN_DIR", help="Folder of the result.")
@common
def command(model: Path, data: str, *, points: int, out: Path, **asked: Any) -> Output:
    """Measure the best drop at each of several sizes; writes frontier.html and frontier.json.

    \b
    featherweight frontier lite0.onnx --data images/ --points 8 -o run
    """
    from featherweight.pipeline import frontier
    from featherweight.report import files
    from featherweight.report.json import to_json

    with progress() as shown:
        report = frontier(model, data, out=out, points=points, progress=shown, **options.search_arguments(asked))
    files.write(report, out, name="frontier", title=f"{model.name}, size against drop")

    def parts() -> list[Any]:
        from featherweight.report.front import front_parts

        return [*front_parts(report), *written_parts(out, ("frontier.html", "frontier.json"))]

    return Output(lambda: to_json(report), parts, MET if report.front else NOT_MET)

"""`featherweight decide`: is there a model within the budget?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, report_output
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Say whether a model within a budget exists.")
@options.model_argument
@options.data_option
@options.budget_options
@options.search_options
@options.recover_option
@option("-o", "--out", type=options.PATH, metavar="RUN_DIR", help="Keep the run here; needed for --resume.")
@options.all_layers_option
@common
def command(model: Path, data: str, *, out: Path | None, all_layers: bool, **asked: Any) -> Output:
    """Answer yes (with the model), no (proved), or not found (how near it came).

    \b
    featherweight decide lite0.onnx --data images/ --max-size 3MB --max-drop 1%
    """
    from featherweight.pipeline import decide

    if asked["resume"] and out is None:
        raise click.UsageError("--resume needs the run folder: give it with -o RUN_DIR")
    with progress() as shown:
        report = decide(model, data, out=out, progress=shown, **options.search_arguments(asked))
    output = report_output(report, all_layers=all_layers)

    def parts() -> list[Any]:
        from rich.text import Text

        from featherweight.report.text import ANSWER_STYLES

        return [Text(f"answer: {report.answer}", style=ANSWER_STYLES[report.answer]), *output.parts()]

    return Output(output.as_json, parts, output.code)

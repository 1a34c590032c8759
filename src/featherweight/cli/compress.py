"""`featherweight compress`: the smallest model within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, report_output, written_parts
from featherweight.cli._sections import Command, option

NOT_WRITTEN = "\nno model was written, as the budget is not met; --save-anyway keeps the nearest (in another folder)"
WRITTEN = ("model.onnx", "plan.json", "report.json", "report.html")


@click.command(cls=Command, short_help="Find the smallest model within a budget.")
@options.model_argument
@options.data_option
@options.budget_options
@options.search_options
@options.recover_option
@option("--save-anyway", is_flag=True, help="Keep the nearest model even if the budget is not met.")
@option("-o", "--out", required=True, type=options.PATH, metavar="RUN_DIR", help="Folder of the result.")
@options.all_layers_option
@common
def command(model: Path, data: str, *, out: Path, all_layers: bool, **asked: Any) -> Output:
    """Find the smallest (or fastest) model within a budget, measured and proved.

    \b
    featherweight compress lite0.onnx --data images/ --max-drop 1% -o run
    featherweight compress lite0.onnx --data images/ --max-size 25% --max-latency 60% -o run
    """
    from featherweight.pipeline import compress

    with progress() as shown:
        report = compress(model, data, out=out, progress=shown, **options.search_arguments(asked))
    output = report_output(report, all_layers=all_layers)
    hint = [] if report.answer != "not found" or (out / WRITTEN[0]).exists() else [NOT_WRITTEN]
    return Output(output.as_json, lambda: output.parts() + hint + written_parts(out, WRITTEN), output.code)

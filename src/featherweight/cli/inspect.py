"""`featherweight inspect`: where bytes, operations, time and memory are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Show where bytes, time and memory are.")
@options.model_argument
@option("--data", metavar="DATA", section="Data", help="Measure the time of each node on this data.")
@options.data_reading_options
@options.machine_options
@option("--channels", is_flag=True, help="Show which channels can be removed, and why others stay.")
@option(
    "--ranks", is_flag=True, help="Show the rank that keeps 90, 99, 99.9% of each weight; with --data of its output."
)
@option("--prune-sensitivity", is_flag=True, help="Show what losing input channels costs each layer (needs --data).")
@options.all_layers_option
@common
def command(
    model: Path, *, data: str | None, batch_size: int, channels: bool, ranks: bool, prune_sensitivity: bool,
    all_layers: bool, **asked: Any,
) -> Output:  # fmt: skip
    """Show where a model's bytes, operations, time and memory are, and what each bit width would leave.

    \b
    featherweight inspect lite0.onnx
    featherweight inspect lite0.onnx --data images/ --preprocess lite0
    featherweight inspect lite0.onnx --channels
    featherweight inspect lite0.onnx --prune-sensitivity --data images/ --preprocess lite0
    """
    if channels + ranks + prune_sensitivity > 1:
        raise click.UsageError("--channels, --ranks and --prune-sensitivity are views of their own; give one of them")
    if channels:
        return _channels(model, all_layers=all_layers)
    if ranks or prune_sensitivity:
        if prune_sensitivity and data is None:
            raise click.UsageError("--prune-sensitivity reads the inputs of the layers: give --data with some samples")
        asked.pop("profile", None)
        return _layers(model, ranks=ranks, all_layers=all_layers, data=data, batch=batch_size, **asked)
    from featherweight.inspection import inspect

    found = inspect(model, data=data, batch=batch_size, **asked)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("inspection", plain(found))

    def parts() -> list[Any]:
        from featherweight.report.inspection import inspection_parts

        return list(inspection_parts(found, everything=all_layers))

    return Output(as_json, parts)


def _channels(model: Path, *, all_layers: bool) -> Output:
    from featherweight.channel_view import channel_view

    view = channel_view(model)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("channels", plain(view))

    def parts() -> list[Any]:
        from featherweight.report.channels import channel_parts

        return list(channel_parts(view, everything=all_layers))

    return Output(as_json, parts)


def _layers(model: Path, *, ranks: bool, all_layers: bool, **reading: Any) -> Output:
    from featherweight import layer_view

    view = layer_view.rank_view(model, **reading) if ranks else layer_view.prune_view(model, **reading)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("ranks" if ranks else "prune_sensitivity", plain(view))

    def parts() -> list[Any]:
        from featherweight.report.layer_view import prune_parts, rank_parts

        if isinstance(view, layer_view.RankView):
            return list(rank_parts(view, everything=all_layers))
        return list(prune_parts(view, everything=all_layers))

    return Output(as_json, parts)

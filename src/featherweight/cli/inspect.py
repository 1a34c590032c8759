"""`featherweight inspect`: where bytes, operations, time and memory are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, onnx_of
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Show where bytes, time and memory are.")
@options.model_argument
@option("--data", metavar="DATA", section="Data", help="Measure the time of each node on this data.")
@options.data_reading_options
@options.trust_option
@options.machine_options
@options.agent_options
@option("--targets", is_flag=True, help="Show every shipped device side by side: fits, predicted latency, memory.")
@option("--channels", is_flag=True, help="Show which channels can be removed, and why others stay.")
@option(
    "--ranks", is_flag=True, help="Show the rank that keeps 90, 99, 99.9% of each weight; with --data of its output."
)
@option("--prune-sensitivity", is_flag=True, help="Show what losing input channels costs each layer (needs --data).")
@options.all_layers_option
@common
def command(
    model: Path, *, data: str | None, batch_size: int, channels: bool, ranks: bool, prune_sensitivity: bool,
    targets: bool, all_layers: bool, trust: bool, target_token_file: Path | None, target_ca: Path | None, **asked: Any,
) -> Output:  # fmt: skip
    """Show where a model's bytes, operations, time and memory are, and what each bit width would leave.

    \b
    featherweight inspect lite0.onnx
    featherweight inspect lite0.onnx --data images/ --preprocess lite0
    featherweight inspect lite0.onnx --targets
    featherweight inspect lite0.onnx --target raspberry-pi-4
    featherweight inspect lite0.onnx --channels
    featherweight inspect bert-folder/
    featherweight inspect lite0.onnx --prune-sensitivity --data images/ --preprocess lite0
    """
    if channels + ranks + prune_sensitivity + targets > 1:
        raise click.UsageError(
            "--targets, --channels, --ranks and --prune-sensitivity are views of their own; give one of them"
        )
    if prune_sensitivity and data is None:
        raise click.UsageError("--prune-sensitivity reads the inputs of the layers: give --data with some samples")
    with onnx_of(model, trust=trust) as (path, tokenizer):
        if channels:
            return _channels(path, all_layers=all_layers)
        asked["tokenizer"] = asked["tokenizer"] or tokenizer
        if ranks or prune_sensitivity:
            asked.pop("profile", None)
            return _layers(path, ranks=ranks, all_layers=all_layers, data=data, batch=batch_size, **asked)
        if targets:
            return _targets(path, asked, data=data, batch=batch_size)
        asked["profile"] = _device(asked["profile"], target_token_file, target_ca)
        return _inspection(path, all_layers=all_layers, data=data, batch=batch_size, **asked)


def _inspection(model: Path, *, all_layers: bool, **asked: Any) -> Output:
    from featherweight.inspection import inspect

    found = inspect(model, **asked)

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("inspection", plain(found))

    def parts() -> list[Any]:
        from featherweight.report.inspection import inspection_parts

        return list(inspection_parts(found, everything=all_layers))

    return Output(as_json, parts)


def _device(target: str | None, token_file: Path | None, ca: Path | None) -> Any:
    """The profile that an agent tells of its device; a name, file or nothing as it is."""
    if target is None or not target.lower().startswith(("http://", "https://")):
        return target
    from featherweight.edge.remote import device_profile

    return device_profile(target, token_file=token_file, ca=ca)


def _targets(model: Path, asked: dict[str, Any], *, data: str | None, batch: int) -> Output:
    from featherweight.target_view import target_view

    view = target_view(
        model,
        data=data,
        batch=batch,
        preprocess=asked["preprocess"],
        tokenizer=asked["tokenizer"],
        also=asked["profile"],
    )

    def as_json() -> str:
        from featherweight.report.json import document, plain

        return document("targets", plain(view))

    def parts() -> list[Any]:
        from featherweight.report.targets import target_parts

        return list(target_parts(view))

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

"""`featherweight place`: device, edge server, own server, cloud or split, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import MET, NOT_MET, Output, common, progress
from featherweight.cli._sections import Command, option
from featherweight.cli.split import read_shapes
from featherweight.quantities import parse_count


@click.command(cls=Command, short_help="Compare device, edge server, cloud and splits.")
@options.model_argument
@option("--compressed", type=options.PATH, multiple=True, metavar="FILE", help="Another form of the model, placed too.")
@option("--device", required=True, metavar="NAME|FILE", section="Target", help="The device's profile.")
@option("--devices", type=click.IntRange(min=1), default=1, metavar="N", section="Target", help="They share the load.")
@option("--own-devices", is_flag=True, section="Target", help="Count the price and power of the devices as money.")
@option(
    "--link",
    default="4g",
    show_default=True,
    metavar="LINK",
    section="Target",
    help="To the clouds: lan, wifi, 4g, 5g, fibre, adsl, satellite, or up=5Mbit,down=20Mbit,rtt=40ms,outage=1%.",
)
@option("--edge-link", default="wifi", show_default=True, metavar="LINK", section="Target", help="To the edge server.")
@option("--onprem-link", metavar="LINK", section="Target", help="To one's own servers. Default: as --link.")
@option("--edge", default="edge-mini", show_default=True, metavar="OFFER|none", section="Target", help="Edge server.")
@option("--onprem", default="onprem-cpu", show_default=True, metavar="OFFER|none", section="Target", help="Own server.")
@option(
    "--cloud",
    "clouds",
    multiple=True,
    metavar="OFFER|none",
    section="Target",
    help="An offer of the price tables, may be repeated. Default: aws-cpu, aws-gpu, aws-serverless.",
)
@option(
    "--prices",
    "price_files",
    type=options.PATH,
    multiple=True,
    metavar="FILE",
    section="Target",
    help="Your own prices (docs/place.md).",
)
@option(
    "--free-shares/--no-free-shares",
    default=True,
    show_default=True,
    section="Target",
    help="Count what clouds give free each month, as if nothing else used it.",
)
@option(
    "--requests",
    required=True,
    type=options.Quantity("count", parse_count),
    metavar="N",
    section="Data",
    help="Requests a month: 3M, 200k.",
)
@option(
    "--peak",
    type=click.FloatRange(min=1),
    default=3.0,
    show_default=True,
    metavar="X",
    section="Data",
    help="The busiest rate over the mean.",
)
@option(
    "--upload",
    type=options.SIZE,
    metavar="SIZE",
    section="Data",
    help="What the app sends a server for a call, e.g. a JPEG of 60kB. Default: the input tensors.",
)
@option("--shape", "shapes", multiple=True, metavar="NAME=1x64", section="Data", help="Size of an input's axes.")
@option(
    "--wire",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    section="Data",
    help="How a split sends what the device computed.",
)
@option(
    "--measured",
    multiple=True,
    metavar="PLACE=TIME",
    section="Data",
    help="A measured call instead of a predicted one: device=12ms, edge/compressed=5ms.",
)
@option("--data-stays", type=click.Choice(["device", "site"]), section="Budget", help="Where the input must stay.")
@option("--features-stay", is_flag=True, section="Budget", help="What is computed from the input must stay too.")
@option("--not-private", multiple=True, metavar="INPUT", section="Budget", help="An input --data-stays does not mean.")
@option(
    "--must-work-offline",
    "offline",
    is_flag=False,
    flag_value="any",
    type=click.Choice(["any", "internet"]),
    section="Budget",
    help="Without any network, or without the internet.",
)
@option("--max-latency", type=options.LATENCY, metavar="TIME", section="Budget", help="95th percentile of a call.")
@option("--max-cost", type=click.FloatRange(min=0), metavar="MONEY", section="Budget", help="A month.")
@option(
    "--minimize",
    "goal",
    type=click.Choice(["latency", "cost", "energy"]),
    section="Budget",
    help="What is best. Default: cost if latency is limited, else latency.",
)
@option(
    "-o",
    "--out",
    type=options.PATH,
    metavar="DIR",
    help="Write placement.json, placement.html and placement.png (who wins over bandwidth and load).",
)
@common
def command(model: Path, *, out: Path | None, **asked: Any) -> Output:
    """Compare every place a model can run, alone or split: latency, energy, money, privacy, offline.

    \b
    featherweight place lite0.onnx --device phone --requests 3M --upload 60kB
    featherweight place lite0.onnx --compressed small.onnx --device phone --requests 3M --max-latency 150ms
    featherweight place scan.onnx --device tablet --requests 50k --data-stays site --must-work-offline internet
    """
    from featherweight.edge import asking, breakeven

    answer = asking.place(model, **_arguments(asked))
    won = None
    if out is not None:
        with progress() as shown:
            won = breakeven.winners(answer.question, progress=shown)
        from featherweight.report import placement_page

        placement_page.write(answer, won, out)

    def as_json() -> str:
        from featherweight.report.placement_page import to_json

        return to_json(answer, won)

    def parts() -> list[Any]:
        from featherweight.report.placement_text import placement_parts

        return list(placement_parts(answer, out))

    return Output(as_json, parts, MET if answer.ok else NOT_MET)


def _arguments(asked: dict[str, Any]) -> dict[str, Any]:
    """The keywords of asking.place from what the options gave."""
    from featherweight.edge.place import Rules
    from featherweight.quantities import parse_latency

    limit = asked.pop("max_latency")
    ms, ratio = (None, None) if limit is None else parse_latency(limit)
    if ratio is not None:
        raise click.UsageError("--max-latency of a placement is a time, such as 150ms")
    rules = Rules(
        data_stays=asked.pop("data_stays") or "",
        features_stay=asked.pop("features_stay"),
        offline=asked.pop("offline") or "",
        max_latency_ms=ms,
        max_cost=asked.pop("max_cost"),
    )
    measured = {}
    for text in asked.pop("measured"):
        key, _, value = text.rpartition("=")
        if not key:
            raise click.UsageError(f"--measured is written like device=12ms, but got {text!r}")
        measured[key] = value
    clouds, shapes = asked.pop("clouds"), asked.pop("shapes")
    return {
        **asked,
        **({"clouds": clouds} if clouds else {}),
        "input_shapes": read_shapes(shapes),
        "measured": measured,
        "rules": rules,
    }

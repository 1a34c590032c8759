"""`featherweight profile`: measure this machine, for predictions on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, written_parts
from featherweight.cli._sections import Command, option
from featherweight.quantities import parse_duration


@click.command(cls=Command, short_help="Measure this machine, so that others can predict for it.")
@option("-o", "--out", type=options.PATH, metavar="FILE", help="Write the profile here, for --target FILE.")
@option("--name", metavar="TEXT", section="Target", help="Name of the device. Default: the host's.")
@options.threads_option
@option("--idle-watts", type=click.FloatRange(min=0), metavar="W", section="Target", help="Power idle, if you know it.")
@option("--busy-watts", type=click.FloatRange(min=0), metavar="W", section="Target", help="Power at work.")
@option(
    "--time", "seconds", type=options.DURATION, metavar="TIME", default="60s", show_default=True, section="Search",
    help="Time for the measurements; loading takes up to half a minute more.",
)  # fmt: skip
@common
def command(
    *, out: Path | None, name: str | None, threads: int, idle_watts: float | None, busy_watts: float | None,
    seconds: str,
) -> Output:  # fmt: skip
    """Measure operators by kind, size and precision, memory bandwidth, overheads and threads of this machine.

    \b
    featherweight profile -o here.json
    featherweight inspect lite0.onnx --target here.json
    """
    from featherweight.edge.profiles import measure_profile, save_profile
    from featherweight.runtime.targets import to_json

    with progress() as shown:
        found = measure_profile(
            threads=threads, seconds=parse_duration(seconds), name=name, idle_w=idle_watts, busy_w=busy_watts,
            progress=shown,
        )  # fmt: skip
    if out is not None:
        save_profile(found, out)

    def parts() -> list[Any]:
        from featherweight.report.targets import profile_parts

        return [*profile_parts(found), *(written_parts(out.parent, (out.name,)) if out is not None else [])]

    return Output(lambda: to_json(found), parts)

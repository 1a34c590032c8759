"""The group `featherweight words`: one file a command, found as the top commands are."""

from __future__ import annotations

import click

from featherweight.cli import Commands


class WordCommands(Commands):
    """The commands of this package."""

    package = __name__


@click.command(
    cls=WordCommands,
    short_help="Word vectors: explain, train, compress, judge.",
    epilog="All of them take --json. Help of one: featherweight words windows --help",
)
def command() -> None:
    """Word vectors: how they are learnt, and how large tables of them become small.

    \b
    featherweight words windows "The fat cat sat on the mat" --window 3
    featherweight words compress vectors.bin --max-size 10% -o small.safetensors
    """

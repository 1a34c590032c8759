"""Options under headings in --help: a long list of options is read by topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

FIRST_COLUMN = 28
SECTIONS = ("Budget", "Data", "Target", "Search", "Output")


class Option(click.Option):
    """An option that knows its heading."""

    def __init__(self, *args: Any, section: str = "Output", **kwargs: Any) -> None:
        """As click.Option; `section` is one of SECTIONS."""
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help groups options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list a heading; what has none goes to the last."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups[getattr(param, "section", SECTIONS[-1])].append(record)
        widest = max(len(name) for records in groups.values() for name, _ in records)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(min(widest, FIRST_COLUMN)), text) for name, text in records])


def option(*names: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """click.option with a `section`."""
    return click.option(*names, cls=Option, **kwargs)

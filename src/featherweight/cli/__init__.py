"""The command line. One file a command: a module here without a leading underscore, with a click `command`.

Commands are found by file name and imported when invoked. They import what is heavy inside their function, so that
`featherweight --help` stays fast. Exit codes: 0 met, 1 error, 2 usage, 3 budget not met, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any

import click


class Commands(click.Group):
    """A group whose commands are the modules of a package: by default this one."""

    package = __name__

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """All command names, sorted."""
        folders = importlib.import_module(self.package).__path__
        return sorted(info.name for info in pkgutil.iter_modules(folders) if not info.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of one module, or None. Raises click.UsageError with near names where there are some."""
        if cmd_name not in self.list_commands(ctx):
            near = difflib.get_close_matches(cmd_name, self.list_commands(ctx), n=2)
            if near and not ctx.resilient_parsing:
                ctx.fail(f"there is no command {cmd_name!r}; did you mean {' or '.join(near)}?")
            return None
        command: Any = importlib.import_module(f"{self.package}.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.package}.{cmd_name}.command must be a click command, but got {command!r}")
        return command


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Print the version and stop; read only when asked."""
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"featherweight {version('featherweight')}")
        ctx.exit()


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 budget met, 1 error, 2 usage, 3 budget not met. New here? Run: featherweight demo",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def group() -> None:
    """Model in, budget in, the smallest model that meets it out, with the measurements that prove it."""


def main() -> None:
    """Entry point of the console script."""
    group(prog_name="featherweight")

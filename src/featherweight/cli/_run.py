"""What every command does around its one call: JSON or text out, errors as one message, exit codes, progress."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from featherweight.cli._sections import option
from featherweight.core import Progress, Report, Silent
from featherweight.errors import FeatherweightError

QUIET = "featherweight.quiet"
MET, ERROR, USAGE, NOT_MET, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Output:
    """What a command answers: JSON text, terminal parts (each made only when wanted), and its exit code."""

    as_json: Callable[[], str]
    parts: Callable[[], list[Any]]
    code: int = MET


def common(run: Callable[..., Output]) -> Callable[..., None]:
    """Add --json, --quiet and --debug to a command that returns an Output, and carry that Output out."""

    @option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else.")
    @option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(run)
    def wrapped(*args: Any, as_json: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        try:
            click.get_current_context().meta[QUIET] = quiet
            output = run(*args, **kwargs)
            emit(output, as_json=as_json)
            code = output.code
        except KeyboardInterrupt:
            click.echo(interrupted_words(kwargs.get("out")), err=True)
            code = INTERRUPTED
        except BrokenPipeError:
            _close_stdout()
            code = ERROR
        except (FeatherweightError, MemoryError, OSError) as e:
            if debug:
                raise
            report_error(e, as_json=as_json)
            code = ERROR
        sys.exit(code)

    return wrapped


def emit(output: Output, *, as_json: bool) -> None:
    """Write the answer to stdout in the form that was asked for."""
    if as_json:
        sys.stdout.write(output.as_json())
    else:
        from featherweight.report.terminal import show

        show(output.parts())
    sys.stdout.flush()


def report_error(e: BaseException, *, as_json: bool) -> None:
    """The message on stderr; with --json also as the one document on stdout."""
    message = str(e) or ("out of memory" if isinstance(e, MemoryError) else type(e).__name__)
    click.echo(f"error: {message}", err=True)
    if as_json:
        document = {"schema": 1, "kind": "error", "error": type(e).__name__, "message": message}
        click.echo(json.dumps(document, indent=1))


@contextmanager
def until_stopped(*, debug: bool, as_json: bool) -> Iterator[None]:
    """Around a command that runs until it is stopped: Ctrl-C ends it without words, an error with one message."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (FeatherweightError, MemoryError, OSError) as e:
        if debug:
            raise
        report_error(e, as_json=as_json)
        sys.exit(ERROR)


def interrupted_words(out: Path | None) -> str:
    """What Ctrl-C left behind, as it is on disk."""
    if out is None or not out.is_dir():
        return "stopped; nothing was written"
    if (out / "model.onnx").exists():
        return f"stopped; best so far kept in {out}; continue with --resume"
    return f"stopped before a first model was kept; what was measured is in {out}; continue with --resume"


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on stderr if it is a terminal and --quiet was not given, else silence."""
    if click.get_current_context().meta.get(QUIET) or not sys.stderr.isatty():
        yield Silent()
        return
    from featherweight.report.progress import TerminalProgress

    with TerminalProgress() as shown:
        yield shown


@contextmanager
def onnx_of(model: Path, *, trust: bool) -> Iterator[tuple[Path, Path | None]]:
    """The ONNX file of a model argument and the tokenizer that came with it; told on stderr where it was converted."""
    from featherweight.convert import as_onnx

    with as_onnx(model, trust=trust) as (path, found):
        if found is not None and not click.get_current_context().meta.get(QUIET):
            for text in (found.line, *(f"{n.where}: {n.text}" for n in found.notes)):
                click.echo(text, err=True)
        yield path, None if found is None else found.tokenizer


def report_output(report: Report, *, all_layers: bool = False, code: int | None = None) -> Output:
    """The Output of a command that ends with a Report: 0 if the budget is met, else 3."""

    def as_json() -> str:
        from featherweight.report.json import to_json

        return to_json(report)

    def parts() -> list[Any]:
        from featherweight.report.text import report_parts

        return list(report_parts(report, all_layers=all_layers))

    return Output(as_json, parts, (MET if report.ok else NOT_MET) if code is None else code)


def written_parts(out: Path, names: tuple[str, ...]) -> list[Any]:
    """The last lines: which files were written, of those that exist."""
    from rich.text import Text

    there = [name for name in names if (out / name).exists()]
    if not there:
        return []
    return [Text.assemble("\nwritten to ", (str(out), "bold"), f": {', '.join(there)}")]


def _close_stdout() -> None:
    """Let a closed pipe end quietly: what Python still holds in its buffer goes nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Options several commands share. The text of a quantity is checked here, so that a typo is a usage error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from featherweight.cli._sections import option
from featherweight.errors import BudgetError
from featherweight.quantities import parse_count, parse_duration, parse_fraction, parse_latency, parse_size

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class Quantity(click.ParamType[str]):
    """Text that one of quantities' readers understands; passed on as the text it is."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        """`read` raises BudgetError on text it cannot read."""
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text as given, once it is known to be readable."""
        try:
            self._read(value)
        except BudgetError as e:
            self.fail(str(e), param, ctx)
        return value


SIZE = Quantity("size", lambda text: parse_size(text, 10**12))
LATENCY = Quantity("time", parse_latency)
COUNT = Quantity("count", lambda text: parse_count(text, 10**12))
DROP = Quantity("drop", parse_fraction)
DURATION = Quantity("duration", parse_duration)


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; help lists them in this order."""

    def decorate(f: F) -> F:
        for decorator in reversed(options):
            f = decorator(f)
        return f

    return decorate


model_argument = click.argument("model", type=PATH)

trust_option = option(
    "--trust",
    is_flag=True,
    section="Data",
    help="Load a PyTorch model even if that can run code from its file.",
)

data_option = option(
    "--data", required=True, metavar="DATA", section="Data", help=".npz, image folder, .tsv, or module:function."
)

form_options = _all(
    option(
        "--preprocess",
        metavar="SPEC",
        section="Data",
        help="How images become inputs: a preset, key=value pairs, or a JSON file (docs/formats.md).",
    ),
    option("--tokenizer", type=PATH, metavar="FILE", section="Data", help="tokenizer.json for text data."),
)

data_reading_options = _all(
    form_options,
    option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        default=1,
        show_default=True,
        section="Data",
        help="Samples a call.",
    ),
)

metric_option = option(
    "--metric",
    metavar="NAME",
    section="Data",
    help="accuracy, top5, agreement, cosine, kl, sqnr, spearman or module:function. "
    "Default: fits the data; without labels, agreement with the original.",
)

threads_option = option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    section="Target",
    help="Threads of the runtime.",
)

machine_options = _all(
    option(
        "--target",
        "profile",
        metavar="this|NAME|FILE|URL",
        section="Target",
        help="The device: this (trust this CPU's kernels), a shipped name or profile file (latency is predicted), or "
        "an agent's http://HOST:PORT. Default: measured here, integer weights right on any CPU.",
    ),
    threads_option,
)

agent_options = _all(
    option(
        "--target-token-file",
        type=PATH,
        metavar="FILE",
        section="Target",
        help="Token of the agent at --target. Default: FEATHERWEIGHT_AGENT_TOKEN.",
    ),
    option(
        "--target-ca", type=PATH, metavar="FILE", section="Target", help="Authority (PEM) of an agent's certificate."
    ),
)

budget_options = _all(
    option("--max-size", type=SIZE, metavar="SIZE", section="Budget", help="5MB, 4.5MiB, or 25% of the original."),
    option("--max-latency", type=LATENCY, metavar="TIME", section="Budget", help="8ms, or 60% of the original."),
    option(
        "--max-peak-memory", type=SIZE, metavar="SIZE", section="Budget", help="Peak memory of inference, e.g. 50MB."
    ),
    option(
        "--max-macs", type=COUNT, metavar="N", section="Budget", help="Multiply-accumulates of a call: 300M, or 70%."
    ),
    option(
        "--max-drop", type=DROP, metavar="DROP", section="Budget", help="Loss of the metric: 1% or 0.01 (3dB for sqnr)."
    ),
    option(
        "--minimize",
        type=click.Choice(["size", "latency", "memory", "drop"]),
        metavar="WHAT",
        section="Budget",
        help="size, latency, memory or drop. Default: the drop if a resource is limited, else the size; "
        "with nothing asked, a fast 8-bit model.",
    ),
)

recover_option = option(
    "--recover",
    type=click.Choice(["ridge", "distill"]),
    metavar="HOW",
    section="Search",
    help="ridge (default): weights solved anew after a change of structure. distill: the original also teaches a "
    "candidate that misses the drop by little.",
)

search_options = _all(
    option("--calibration", metavar="DATA", section="Data", help="Data that sets ranges. Default: a part of --data."),
    metric_option,
    data_reading_options,
    trust_option,
    machine_options,
    agent_options,
    option("--techniques", metavar="A,B", section="Search", help="Use only these. Default: all."),
    option(
        "--keep-float",
        multiple=True,
        metavar="PATTERN",
        section="Search",
        help="Leave these nodes alone (may be repeated).",
    ),
    option(
        "--time-budget",
        type=DURATION,
        metavar="TIME",
        section="Search",
        help="Stop after 10m, 90s, 1h30m; keep the best so far.",
    ),
    option(
        "--max-candidates",
        type=click.IntRange(min=1),
        metavar="N",
        section="Search",
        help="Build and measure at most N.",
    ),
    option(
        "--seed", type=int, metavar="N", default=0, show_default=True, section="Search", help="Same seed, same model."
    ),
    option("--resume", is_flag=True, section="Search", help="Continue the interrupted run in the run folder."),
)

all_layers_option = option("--all-layers", is_flag=True, help="Show every layer, note and attempt.")


def search_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of pipeline.compress from what the options gave."""
    named = options["techniques"]
    techniques = None if named is None else tuple(t.strip() for t in named.split(",") if t.strip())
    return {**options, "techniques": techniques}

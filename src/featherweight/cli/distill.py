"""`featherweight distill`: the original teaches a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, written_parts
from featherweight.cli._sections import Command, option
from featherweight.learn._choices import ROUNDINGS, SCALES

WRITTEN = ("model.onnx", "report.json", "report.html")


@click.command(cls=Command, short_help="Let the original teach a compressed model.")
@click.argument("teacher", type=options.PATH)
@option(
    "--student",
    required=True,
    metavar="STUDENT",
    section="Search",
    help="A compressed .onnx; or .pt2, module:function, or cut from the teacher: layers=3, width=50%.",
)
@options.data_option
@options.trust_option
@option("--calibration", metavar="DATA", section="Data", help="Data to train on. Default: a part of --data.")
@option("--labels", is_flag=True, section="Data", help="Learn from labels too, where the data has classes.")
@option(
    "--augment", metavar="KINDS", section="Data",
    help="flip, crop, color, mixup, cutmix or none. Default: all of them for image files.",
)  # fmt: skip
@options.metric_option
@options.form_options
@option("--batch-size", type=click.IntRange(min=1), metavar="N", section="Search", help="Samples a step. Default: 16.")
@option("--stages", metavar="A,B", section="Search", help="layers, end. Default: by the student.")
@option(
    "--loss",
    type=click.Choice(["auto", "kl", "embedding", "mse"]),
    metavar="NAME",
    section="Search",
    help="auto (by what the outputs are), kl, embedding or mse.",
)
@option(
    "--temperature", type=float, metavar="T", section="Search", help="Of the class scores. Default: 4; 1 with labels."
)
@option("--features", type=float, metavar="W", section="Search", help="Weight of inner tensors. Default: 8.")
@option(
    "--learning-rate",
    "rate",
    type=float,
    metavar="R",
    section="Search",
    help="Highest, relative to each weight. Default: by the damage.",
)
@option("--ema", type=float, metavar="DECAY", section="Search", help="Average weights over steps. Default: 0.98.")
@option("--freeze", metavar="NAMES", section="Search", help="Weights that stay, e.g. '*embeddings*'; commas between.")
@option(
    "--train-scales",
    type=click.Choice(SCALES),
    metavar="WHICH",
    section="Search",
    help="Of the quantizers: none, weights or all (default).",
)
@option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    metavar="HOW",
    section="Search",
    help="Of codes in blocks: straight (default) or learned.",
)
@option("--max-steps", type=click.IntRange(min=1), metavar="N", section="Search", help="Steps of each stage.")
@option(
    "--time-budget", type=options.DURATION, metavar="TIME", section="Budget", help="Of the whole run. Default: 20m."
)
@option("--max-memory", type=options.SIZE, metavar="SIZE", section="Budget", help="While training, e.g. 2GB.")
@option("--threads", type=click.IntRange(min=1), metavar="N", section="Target", help="Default: all cores.")
@option("--seed", type=int, metavar="N", default=0, show_default=True, section="Search", help="Same seed, same model.")
@option("--resume", is_flag=True, section="Search", help="Continue the stopped run in the run folder.")
@option("-o", "--out", required=True, type=options.PATH, metavar="RUN_DIR", help="Folder of the result.")
@options.all_layers_option
@common
def command(teacher: Path, *, student: str, data: str, out: Path, all_layers: bool, **asked: Any) -> Output:
    """Let the original teach a compressed model on data without labels; measured before and after.

    \b
    featherweight distill lite0.onnx --student run/model.onnx --data images/ -o taught
    featherweight distill bert-folder/ --student layers=3 --data sentences.tsv -o small
    """
    from featherweight.pipeline import distill

    with progress() as shown:
        found = distill(teacher, student, data, out=out, progress=shown, **asked)
    if found.interrupted:
        raise KeyboardInterrupt

    def as_json() -> str:
        from featherweight.report.distillation import to_json

        return to_json(found)

    def parts() -> list[Any]:
        from featherweight.report.distillation import parts as of

        return [*of(found, everything=all_layers), *written_parts(out, WRITTEN)]

    return Output(as_json, parts)

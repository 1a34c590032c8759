"""`featherweight words compare`: the same quality numbers of two tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option
from featherweight.cli.words._reading import reading_options, task_loader, task_options, tokenizer_of, vectors_argument


@click.command(cls=Command, short_help="Judge two tables side by side.")
@vectors_argument
@click.argument("other", type=options.PATH, required=False)
@option("--similarity", multiple=True, type=options.PATH, metavar="FILE", section="Data",
        help="Word pairs with human scores, e.g. WordSim-353 (may be repeated).")  # fmt: skip
@option("--analogies", multiple=True, type=options.PATH, metavar="FILE", section="Data",
        help="Questions a b c d, e.g. questions-words.txt (may be repeated).")  # fmt: skip
@reading_options
@task_options
@option("--seed", type=int, metavar="N", default=0, show_default=True, section="Search", help="Of the words drawn.")
@common
def command(vectors: Path, other: Path | None, **asked: Any) -> Output:
    """Judge VECTORS, and OTHER beside it: neighbours and cosines kept, similarity lists, analogies, a task.

    \b
    featherweight words compare vectors.bin small.safetensors --similarity wordsim353.tsv
    """
    from featherweight.embeddings import comparing

    tokenizer = tokenizer_of(asked)
    task = task_loader(asked.pop("task"), asked.pop("train"), tokenizer)
    rows = comparing.compare(vectors, other, make_task=task, **asked)

    def as_json() -> str:
        from featherweight.report.json import document

        return document("word_comparison", {"vectors": vectors, "other": other, "scores": rows})

    def parts() -> list[Any]:
        from featherweight.report.word_tables import comparison_parts

        return comparison_parts(rows, vectors.name, None if other is None else other.name)

    return Output(as_json, parts)

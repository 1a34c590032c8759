"""`featherweight words compress`: a table of word vectors within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress, report_output
from featherweight.cli._sections import Command, option
from featherweight.cli.words._reading import reading_options, task_loader, task_options, tokenizer_of, vectors_argument


@click.command(cls=Command, short_help="Find the nearest table within a budget.")
@vectors_argument
@option("--max-size", type=options.SIZE, metavar="SIZE", section="Budget", help="5MB, or 10% of the float32 table.")
@option("--max-drop", type=options.DROP, metavar="DROP", section="Budget", help="Loss of the metric: 1% or 0.01.")
@option("--frontier", type=click.IntRange(2, 50), metavar="N", section="Search", help="Measure N sizes instead.")
@option("--for", "use", type=click.Choice(["words", "texts"]), section="Search",
        help="Measure the nearest words, or texts of drawn words. Default: words; for .onnx texts.")  # fmt: skip
@option("--counts", type=options.PATH, metavar="FILE", section="Data",
        help="Word and count a line. Default: row i is taken to come 1 / i as often as the first.")  # fmt: skip
@reading_options
@task_options
@option("--keep-words", is_flag=True, section="Search", help="Never let rare words share a row, as --counts allows.")
@option("--seed", type=int, metavar="N", default=0, show_default=True, section="Search", help="Same seed, same table.")
@option("--plain", type=options.PATH, metavar="FILE", help="Also write the vectors for others: .bin, .txt, .npy.")
@option("--normalise", is_flag=True, help="Let the .onnx give vectors of length 1.")
@option(
    "-o", "--out", required=True, type=options.PATH, metavar="FILE", help=".safetensors (words), .onnx (token ids)."
)
@common
def command(vectors: Path, *, out: Path, plain: Path | None, normalise: bool, **asked: Any) -> Output:
    """Find the table nearest to VECTORS within a size, or the smallest within a drop; measured, not promised.

    \b
    featherweight words compress vectors.bin --max-size 10% -o small.safetensors
    featherweight words compress emb.safetensors --vocabulary tokenizer.json --max-drop 1% -o encoder.onnx
    """
    from featherweight.embeddings import output
    from featherweight.embeddings.write import write_vectors
    from featherweight.report import files

    output.check_ending(out)
    tokenizer = tokenizer_of(asked)
    task = task_loader(asked.pop("task"), asked.pop("train"), tokenizer)
    with progress() as shown:
        found = _searched(vectors, out, task, shown, **asked)
    report, table = found.report, found.table
    written = []
    if table is not None and (report.ok or asked["frontier"]):
        output.save(out, table, found.words, normalise=normalise)
        written.append(out.name)
        if plain is not None:
            write_vectors(plain, output.decoded_blocks(table, found.words), table.dim)
            written.append(str(plain))
    files.write(report, out.parent, name=f"{out.stem}.report", title=vectors.name)
    shown_report = report_output(report)

    def parts() -> list[Any]:
        from featherweight.report.word_tables import compressed_parts

        return [*compressed_parts(report, frontier=bool(asked["frontier"])), _written(out, written)]

    return Output(shown_report.as_json, parts, 0 if asked["frontier"] else shown_report.code)


def _searched(vectors: Path, out: Path, task: Any, shown: Any, **asked: Any) -> Any:
    """Open, look, search."""
    from featherweight.core import Budget
    from featherweight.embeddings import answer, output
    from featherweight.embeddings.compressing import Search
    from featherweight.embeddings.opening import open_table
    from featherweight.embeddings.vocabulary import read_counts
    from featherweight.quantities import parse_fraction, parse_size

    table = open_table(vectors, vocabulary=asked["vocabulary"], tensor=asked["tensor"], skip_bad=asked["skip_bad"])
    search = Search(
        table,
        output.sizer(out, table.dim),
        make_task=task,
        counts=None if asked["counts"] is None else read_counts(asked["counts"]),
        use=asked["use"] or ("texts" if out.suffix == ".onnx" else "words"),
        cut_words=not asked["keep_words"],
        seed=asked["seed"],
        progress=shown,
    )
    size, drop = asked["max_size"], asked["max_drop"]
    search.budget = Budget(
        max_size_bytes=None if size is None else parse_size(size, search.float_bytes),
        max_drop=None if drop is None else parse_fraction(drop),
        minimize="drop" if size is not None or drop is None else "size",
    )
    if asked["frontier"]:
        return answer.frontier(search, asked["frontier"])
    return answer.compress(search)


def _written(out: Path, names: list[str]) -> Any:
    from rich.text import Text

    report = f"{out.stem}.report.json, {out.stem}.report.html"
    if not names:
        return Text.assemble("\nno table was written, as the budget is not met; the attempts are in ", (report, "bold"))
    return Text.assemble("\nwritten to ", (str(out.parent), "bold"), f": {', '.join(names)}, {report}")

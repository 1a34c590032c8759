"""`featherweight words distil`: a transformer's sentence encoder as a table of token vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Turn a transformer into token vectors.")
@click.argument("model", type=options.PATH)
@option("--tokenizer", required=True, type=options.PATH, metavar="FILE", section="Data", help="Its tokenizer.json.")
@option("--dim", type=click.IntRange(1, 4096), metavar="N", default=256, show_default=True, section="Search",
        help="Principal axes to keep.")  # fmt: skip
@option("--corpus", type=options.PATH, metavar="FILE", section="Data",
        help="Text that tells how often tokens come. Default: id i 1 / i as often as the first.")  # fmt: skip
@option("--sif", type=float, metavar="A", default=3e-4, show_default=True, section="Search",
        help="Weigh tokens by A / (A + probability); 0 weighs all alike.")  # fmt: skip
@options.threads_option
@option(
    "-o",
    "--out",
    required=True,
    type=options.PATH,
    metavar="FILE",
    help=".safetensors, .bin, .txt, .vec, .npy or .onnx.",
)
@common
def command(
    model: Path, tokenizer: Path, *, dim: int, corpus: Path | None, sif: float, threads: int, out: Path
) -> Output:
    """Turn MODEL, a sentence encoder in ONNX, into a table whose mean over a text's tokens stands for the text.

    \b
    featherweight words distil minilm.onnx --tokenizer tokenizer.json -o static.safetensors
    featherweight words compress static.safetensors --tokenizer tokenizer.json --max-size 10% -o small.onnx
    """
    from featherweight.embeddings import distil, output
    from featherweight.runtime.sandbox import Worker

    output.check_plain_ending(out)
    vocabulary, tool = distil.read_vocabulary(tokenizer)
    counts = None
    if corpus is not None:
        counts = distil.token_counts(tool, distil.lines_of(corpus), len(vocabulary.tokens))
    with progress() as shown, Worker() as worker:
        found = distil.distil(
            model, vocabulary, worker=worker, dim=dim, counts=counts, sif=sif, threads=threads, progress=shown
        )
    output.save_vectors(out, found.tokens, found.vectors)

    def as_json() -> str:
        from featherweight.report.json import document

        rows, columns = found.vectors.shape
        return document(
            "word_distillation", {"tokens": rows, "columns": columns, "variance_kept": found.kept, "out": out}
        )

    def parts() -> list[Any]:
        from featherweight.report.word_tables import distilled_parts

        return distilled_parts(found, out)

    return Output(as_json, parts)

"""`featherweight words train`: word vectors of a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common, progress
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Train word vectors on a corpus.")
@click.argument("corpus", type=options.PATH)
@option("--model", type=click.Choice(["skipgram", "cbow"]), default="skipgram", show_default=True, section="Search",
        help="What is predicted: the context from the word, or the word from its context.")  # fmt: skip
@option("--subwords", is_flag=True, section="Search", help="Learn character n-grams too (fastText).")
@option("--dim", type=click.IntRange(1, 4096), metavar="N", default=100, show_default=True, section="Search",
        help="Numbers a word.")  # fmt: skip
@option("--window", type=click.IntRange(1, 1000), metavar="N", default=5, show_default=True, section="Search",
        help="Words to each side of the centre.")  # fmt: skip
@option("--negative", type=click.IntRange(1, 100), metavar="K", default=5, show_default=True, section="Search",
        help="False answers a pair.")  # fmt: skip
@option("--epochs", type=click.IntRange(1), metavar="N", default=5, show_default=True, section="Search",
        help="Passes over the corpus.")  # fmt: skip
@option("--min-count", type=click.IntRange(1), metavar="N", default=5, show_default=True, section="Search",
        help="Leave out rarer words.")  # fmt: skip
@option("--subsample", type=float, metavar="T", default=1e-3, show_default=True, section="Search",
        help="Drop frequent words; 0 keeps all.")  # fmt: skip
@option(
    "--alpha", type=float, metavar="RATE", default=0.025, show_default=True, section="Search", help="Learning rate."
)
@option(
    "--tokenizer",
    "split",
    metavar="MODULE:FUNCTION",
    section="Data",
    help="How text becomes words. Default: white space.",
)
@option("--lower", is_flag=True, section="Data", help="Lowercase first.")
@option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    section="Target",
    help="Default: all cores; 1 repeats bit for bit.",
)
@option(
    "--seed",
    type=int,
    metavar="N",
    default=0,
    show_default=True,
    section="Search",
    help="Same seed and one thread, same vectors.",
)
@option("--resume", is_flag=True, section="Search", help="Go on after the last whole epoch of an interrupted run.")
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
    corpus: Path, *, split: str | None, lower: bool, threads: int | None, resume: bool, out: Path, **asked: Any
) -> Output:
    """Train word vectors on CORPUS, a text file with a sentence a line or a folder of them, through gensim.

    \b
    featherweight words train corpus.txt -o vectors.safetensors
    featherweight words train corpus.txt --model cbow --dim 300 --epochs 10 -o vectors.bin
    """
    from featherweight.embeddings import output, train
    from featherweight.embeddings.corpus import open_corpus
    from featherweight.embeddings.tokens import tokenizer

    output.check_plain_ending(out)
    recipe = train.Recipe(**asked)
    source = open_corpus(corpus, tokenizer(split, lower=lower))
    with progress() as shown:
        found = train.train(
            source, recipe, workers=threads, state=out.with_name(f"{out.name}.state.npz"), resume=resume, progress=shown
        )
    counts = output.save_trained(out, found)

    def as_json() -> str:
        from featherweight.report.json import document

        content = {
            "words": len(found.words), "columns": recipe.dim, "corpus_words": found.corpus_words, "loss": found.loss,
            "words_per_s": found.words_per_s, "resumed_at": found.resumed_at, "out": out, "counts": counts,
        }  # fmt: skip
        return document("word_training", content)

    def parts() -> list[Any]:
        from featherweight.report.word_tables import trained_parts

        return trained_parts(found, recipe.dim, [out, counts])

    return Output(as_json, parts)

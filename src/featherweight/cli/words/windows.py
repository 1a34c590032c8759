"""`featherweight words windows`: the sliding window over a sentence, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featherweight.cli import _options as options
from featherweight.cli._run import Output, common
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Show the sliding window over a sentence.")
@click.argument("text")
@option("--window", type=click.IntRange(1, 1000), metavar="N", default=2, show_default=True, section="Data",
        help="Words to each side of the centre.")  # fmt: skip
@option(
    "--tokenizer",
    "split",
    metavar="MODULE:FUNCTION",
    section="Data",
    help="How text becomes words. Default: white space.",
)
@option("--lower", is_flag=True, section="Data", help="Lowercase first, so that The and the are one word.")
@option(
    "--dynamic", is_flag=True, section="Search", help="A random window from 1 to N at each position, as in training."
)
@option(
    "--subsample", type=float, metavar="T", section="Search", help="Drop frequent words first; word2vec's T is 1e-3."
)
@option("--negative", type=click.IntRange(0, 100), metavar="K", default=0, section="Search",
        help="Draw K false answers for each pair.")  # fmt: skip
@option("--counts", type=options.PATH, metavar="FILE", section="Data",
        help="Text whose word counts set the chances. Default: the sentence's own.")  # fmt: skip
@option("--seed", type=int, metavar="N", default=0, show_default=True, section="Search", help="Same seed, same draws.")
@option("--html", type=options.PATH, metavar="FILE", help="Also write a page that steps through the sentence.")
@common
def command(text: str, *, html: Path | None, **asked: Any) -> Output:
    """Show, for every position of a sentence, the centre and its context, and all training pairs.

    \b
    featherweight words windows "The fat cat sat on the mat" --window 3
    featherweight words windows "나는 오늘 학교에 갔다" --window 2 --html windows.html
    """
    from featherweight.embeddings.lessons import prepared

    found = prepared(text, **asked)
    if html is not None:
        from featherweight.report.words_page import write

        write(found, html)

    def as_json() -> str:
        from featherweight.report.json import document
        from featherweight.report.words import windows_content

        return document("word_windows", windows_content(found))

    def parts() -> list[Any]:
        from featherweight.report.words import windows_parts

        written = [f"\nwritten to {html}"] if html is not None else []
        return [*windows_parts(found), *written]

    return Output(as_json, parts)

"""A sentence as the user gives it, made ready for `windows`: split, counted, with seeded draws."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from featherweight.embeddings.tokens import Tokenizer, tokenizer
from featherweight.embeddings.windows import Lesson, lesson
from featherweight.errors import DataError

MOST_WORDS = 10_000


def prepared(
    text: str,
    *,
    window: int = 2,
    split: str | None = None,
    lower: bool = False,
    dynamic: bool = False,
    subsample: float | None = None,
    negative: int = 0,
    counts: Path | None = None,
    seed: int = 0,
) -> Lesson:
    """The lesson of one text; see `windows.lesson`. `counts`: a text file, read line by line, one sentence a line.

    Raises DataError: nothing to split, more words than a page can show, an unreadable file, numbers out of range.
    """
    words_of = tokenizer(split, lower=lower)
    words = list(words_of(text))
    if len(words) > MOST_WORDS:
        raise DataError(
            f"a text to look at must have at most {MOST_WORDS} words, but got {len(words)}; give one sentence"
        )
    known = None if counts is None else counted(counts, words_of)
    return lesson(words, window, draws(seed), dynamic=dynamic, threshold=subsample, negative=negative, counts=known)


def draws(seed: int) -> Iterator[float]:
    """Endless numbers in [0, 1): the Mersenne Twister of Python's random, the same on every machine."""
    source = random.Random(seed)
    while True:
        yield source.random()


def counted(path: Path, words_of: Tokenizer) -> Counter[str]:
    """How often each word occurs in a text file. Raises DataError naming the line that is not UTF-8."""
    found: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    found.update(words_of(line.decode("utf-8")))
                except UnicodeDecodeError as e:
                    raise DataError(
                        f"{path} line {number} is not UTF-8 ({e.reason} at byte {e.start}); convert it"
                    ) from e
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    return found

"""A corpus as a stream: one sentence a line, never more of it in memory than a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featherweight.embeddings.read_text import opened
from featherweight.embeddings.tokens import Tokenizer, by_space
from featherweight.errors import DataError

LONGEST_LINE = 10_000  # words of one sentence; gensim cuts longer ones, so they are cut here


@dataclass(frozen=True)
class Corpus:
    """The text files of one corpus (.gz too), and how their lines become words. Each iteration reads anew."""

    files: tuple[Path, ...]
    split: Tokenizer = by_space

    def __iter__(self) -> Iterator[list[str]]:
        """Sentences of at most LONGEST_LINE words. Raises DataError naming the line that is not UTF-8."""
        for path in self.files:
            try:
                with opened(path) as file:
                    for number, line in enumerate(file, 1):
                        words = list(self.split(_text(line, path, number)))
                        for start in range(0, len(words), LONGEST_LINE):
                            yield words[start : start + LONGEST_LINE]
            except (OSError, EOFError) as e:
                raise DataError(f"the corpus {path} cannot be read: {e}") from e

    def counts(self) -> tuple[Counter[str], int]:
        """How often each word comes, and how many sentences there are."""
        found: Counter[str] = Counter()
        sentences = 0
        for words in self:
            found.update(words)
            sentences += 1
        return found, sentences


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} line {number} is not UTF-8 ({e.reason} at byte {e.start}); convert it") from e


def open_corpus(path: Path, split: Tokenizer = by_space) -> Corpus:
    """The corpus of a text file, or of all .txt and .txt.gz files of a folder by name. Raises DataError if none."""
    if path.is_dir():
        files = tuple(sorted(p for p in path.iterdir() if p.name.endswith((".txt", ".txt.gz"))))
        if not files:
            raise DataError(f"the folder {path} holds no .txt file")
        return Corpus(files, split)
    if not path.is_file():
        raise DataError(f"there is no corpus {str(path)!r}; give a text file, one sentence a line, or a folder of them")
    return Corpus((path,), split)

"""Options of the commands that read a table of vectors, and how they report what was skipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featherweight.cli import _options as options
from featherweight.cli._sections import option

if TYPE_CHECKING:
    from featherweight.embeddings.tasks import Task

vectors_argument = click.argument("vectors", type=options.PATH)

reading_options = options._all(
    option("--vocabulary", type=options.PATH, metavar="FILE", section="Data",
           help="Words of bare arrays, a line each, or a tokenizer.json. Default: found beside them."),
    option("--tensor", metavar="NAME", section="Data", help="Which array of several. Default: the largest."),
    option("--skip-bad", is_flag=True, section="Data", help="Leave out rows that cannot be used, and count them."),
)  # fmt: skip

task_options = options._all(
    option("--task", type=options.PATH, metavar="TSV", section="Data",
           help="Judge by texts: sentence1, sentence2, score; or text, label."),
    option("--train", type=options.PATH, metavar="TSV", section="Data",
           help="Labelled texts to learn from, for a --task with labels."),
    option("--tokenizer", type=options.PATH, metavar="FILE", section="Data",
           help="tokenizer.json whose ids are the rows. Default: --vocabulary if it is one, else white space."),
)  # fmt: skip


def tokenizer_of(asked: dict[str, Any]) -> Path | None:
    """The tokenizer.json among what was asked, taken out of it."""
    named: Path | None = asked.pop("tokenizer")
    vocabulary: Path | None = asked.get("vocabulary")
    return named or (vocabulary if vocabulary is not None and vocabulary.suffix == ".json" else None)


def task_loader(task: Path | None, train: Path | None, tokenizer: Path | None) -> Callable[[list[str]], Task] | None:
    """What makes the task once the words are known."""
    if task is None:
        return None
    where = task

    def load(words: list[str]) -> Task:
        import numpy as np

        from featherweight.embeddings import store, tasks

        if tokenizer is not None:
            ids_of = tasks.ids_by_tokenizer(tokenizer, len(words))
        else:
            ids_of = tasks.ids_by_word(store.from_arrays(words, np.zeros((len(words), 1), np.float32)))
        return tasks.load_task(where, ids_of, train=train)

    return load

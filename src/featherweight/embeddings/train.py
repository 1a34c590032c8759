"""Training of word vectors: skip-gram or CBOW with negative sampling, with or without sub-words, by gensim.

Mikolov 2013 (arXiv:1310.4546); Bojanowski 2017 (arXiv:1607.04606) for sub-words. gensim does the arithmetic on all
cores; this adds one pass that counts, progress, a saved state after each epoch, and a seed of its own for each epoch,
so that a resumed run draws what an unbroken one would.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Progress, Silent
from featherweight.embeddings.corpus import Corpus
from featherweight.embeddings.tokens import by_space
from featherweight.errors import DataError, MissingExtraError
from featherweight.whole import whole_file

STATE_SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """How to train. `window`, `negative` etc. as in word2vec; `alpha` falls linearly to `min_alpha` over all epochs."""

    model: str = "skipgram"
    dim: int = 100
    window: int = 5
    negative: int = 5
    epochs: int = 5
    min_count: int = 5
    subsample: float = 1e-3
    alpha: float = 0.025
    min_alpha: float = 1e-4
    subwords: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in ("skipgram", "cbow"):
            raise DataError(f"the model must be skipgram or cbow, but got {self.model!r}")
        for name in ("dim", "window", "negative", "epochs", "min_count"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, but got {getattr(self, name)}")


@dataclass(frozen=True)
class Trained:
    """The result. `loss` is gensim's running loss per trained word for each epoch (empty with sub-words, where gensim
    has none); `words_per_s` counts words of the corpus, all epochs, without the counting pass.
    """

    words: list[str]
    vectors: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    loss: tuple[float, ...]
    words_per_s: float
    corpus_words: int
    resumed_at: int


def train(
    corpus: Corpus,
    recipe: Recipe,
    *,
    workers: int | None = None,
    state: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train on a corpus that need not fit in memory.

    `workers`: threads, by default one a core; only with one are two runs of equal seed equal to the last bit. `state`:
    a file that keeps what is needed to go on after each epoch, removed at the end; `resume` goes on from it.
    Raises MissingExtraError without gensim, DataError for a corpus with nothing to learn or a state of another run.
    """
    shown = progress or Silent()
    threads = workers or os.cpu_count() or 1
    shown.start("counting words")
    counts, sentences = corpus.counts()
    total = sum(counts.values())
    model = _model(recipe, threads)
    if not any(c >= recipe.min_count for c in counts.values()):
        raise DataError(
            f"no word comes {recipe.min_count} times in these {total} words, so there is nothing to learn; lower "
            "--min-count or give more text"
        )
    model.build_vocab_from_freq(dict(counts), corpus_count=sentences)
    asked = {**asdict(recipe), "words": total, "sentences": sentences}
    done, losses = _resumed(model, state, asked) if resume and state is not None else (0, [])
    source = _source(corpus)
    started = time.monotonic()
    for epoch in range(done, recipe.epochs):
        shown.start(f"epoch {epoch + 1} of {recipe.epochs}", 100)
        with _watched(shown, losses):
            trained = _epoch(model, recipe, epoch, source, sentences, total)
        losses.append(float(model.running_training_loss) / max(trained, 1))
        if state is not None and epoch + 1 < recipe.epochs:
            _save_state(model, state, asked, epoch + 1, losses)
    seconds = max(time.monotonic() - started, 1e-9)
    if state is not None:
        state.unlink(missing_ok=True)
    wv = model.wv
    return Trained(
        words=list(wv.index_to_key),
        vectors=np.asarray(wv.vectors, np.float32),
        counts=np.array([wv.get_vecattr(w, "count") for w in wv.index_to_key], np.int64),
        loss=() if recipe.subwords else tuple(losses),
        words_per_s=total * (recipe.epochs - done) / seconds,
        corpus_words=total,
        resumed_at=done,
    )


def _model(recipe: Recipe, threads: int) -> Any:
    try:
        from gensim.models import FastText, Word2Vec
    except ImportError as e:
        raise MissingExtraError("training word vectors needs the package 'gensim'; install featherweight[words]") from e
    made = FastText if recipe.subwords else Word2Vec
    keywords: dict[str, Any] = {} if recipe.subwords else {"compute_loss": True}
    return made(
        vector_size=recipe.dim, window=recipe.window, min_count=recipe.min_count, sample=recipe.subsample,
        sg=int(recipe.model == "skipgram"), negative=recipe.negative, alpha=recipe.alpha, min_alpha=recipe.min_alpha,
        workers=threads, seed=recipe.seed, epochs=recipe.epochs, **keywords,
    )  # fmt: skip


def _source(corpus: Corpus) -> dict[str, Any]:
    """What gensim reads: the file itself, which its threads share, where it splits as we do; else our sentences.

    gensim's own reader takes one plain file, splits at white space and cuts long sentences at the same length.
    """
    plain = len(corpus.files) == 1 and corpus.split is by_space and corpus.files[0].suffix != ".gz"
    return {"corpus_file": str(corpus.files[0])} if plain else {"corpus_iterable": corpus}


def _epoch(model: Any, recipe: Recipe, epoch: int, source: Mapping[str, Any], sentences: int, total: int) -> int:
    """One pass; returns the words trained on. The rate falls as if all epochs were one call."""
    model.random = np.random.RandomState(recipe.seed * 1_000_003 + epoch & 0x7FFFFFFF)
    fall = (recipe.alpha - recipe.min_alpha) / recipe.epochs
    keywords = {} if recipe.subwords else {"compute_loss": True}
    trained, _ = model.train(
        **source, total_examples=sentences, total_words=total, epochs=1, report_delay=0.5,
        start_alpha=recipe.alpha - fall * epoch, end_alpha=recipe.alpha - fall * (epoch + 1), **keywords,
    )  # fmt: skip
    return int(trained)


class _Reader(logging.Handler):
    """Turns gensim's lines of progress (percent done, words per second) into ours."""

    def __init__(self, shown: Progress, losses: list[float]) -> None:
        super().__init__(logging.INFO)
        self._shown, self._losses, self._percent = shown, losses, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Read one record; what is no progress is dropped, warnings among it, as it is about gensim's own calls."""
        if not isinstance(record.args, tuple) or len(record.args) < 3 or "PROGRESS" not in str(record.msg):
            return
        percent, speed = record.args[1], record.args[2]
        if isinstance(percent, float) and isinstance(speed, float):
            loss = f", loss {self._losses[-1]:.4g} in the epoch before" if self._losses else ""
            self._shown.trying(f"{speed:,.0f} words/s{loss}")
            step = min(int(percent), 100) - self._percent
            if step > 0:
                self._shown.advance(step)
                self._percent += step


@contextmanager
def _watched(shown: Progress, losses: list[float]) -> Iterator[None]:
    """Listen to gensim's logger while it trains."""
    logger = logging.getLogger("gensim.models.word2vec")
    reader, level, spread = _Reader(shown, losses), logger.level, logger.propagate
    logger.addHandler(reader)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)
        logger.propagate = spread


def _weights(model: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The arrays that training changes, by name."""
    found = {"syn1neg": model.syn1neg}
    for name in ("vectors_vocab", "vectors_ngrams") if hasattr(model.wv, "vectors_ngrams") else ("vectors",):
        found[name] = getattr(model.wv, name)
    return found


def _save_state(model: Any, state: Path, asked: Mapping[str, Any], epoch: int, losses: list[float]) -> None:
    meta = json.dumps({"schema": STATE_SCHEMA, "asked": asked, "epoch": epoch, "loss": losses})
    with whole_file(state) as file:
        np.savez(file, allow_pickle=False, meta=np.array(meta), **_weights(model))


def _resumed(model: Any, state: Path, asked: Mapping[str, Any]) -> tuple[int, list[float]]:
    """Put the saved arrays into a fresh model. Raises DataError if they are of another run or there are none."""
    if not state.is_file():
        raise DataError(f"there is nothing to resume: {state} does not exist; run without --resume")
    try:
        with np.load(state, allow_pickle=False) as saved:
            meta = json.loads(str(saved["meta"]))
            arrays = {name: saved[name] for name in _weights(model)}
            epoch, losses, before = int(meta["epoch"]), [float(x) for x in meta["loss"]], meta["asked"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"the state {state} cannot be read ({e}); delete it and run without --resume") from e
    changed = sorted(k for k in {*asked, *before} if asked.get(k) != before.get(k))
    if changed:
        raise DataError(
            f"the state {state} is of another run: {changed[0]} was {before.get(changed[0])}, now "
            f"{asked.get(changed[0])}"
        )
    for name, array in _weights(model).items():
        array[:] = arrays[name]
    return epoch, losses

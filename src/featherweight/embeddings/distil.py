"""A transformer's sentence encoder as a table of token vectors: no transformer left, a mean is all that is computed.

In the spirit of Model2Vec (Tulkens and van Dongen 2024, github.com/MinishLab/model2vec): each token alone goes through
the teacher, its outputs become a table, principal axes are kept (Pearson 1901), and each token is weighted by
a / (a + p) with its probability p (SIF, Arora 2017), so that frequent tokens say little.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Progress, Silent
from featherweight.embeddings.table import F32
from featherweight.errors import DataError, MissingExtraError, ModelError
from featherweight.runtime import ort
from featherweight.runtime.sandbox import Worker

SIF = 3e-4  # of 1e-4 to 1e-2 the best for MiniLM on STS dev
BATCH = 256
CALL_BATCHES = 8  # sent to the child at once
ROLES = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types"}


@dataclass(frozen=True)
class Distilled:
    """Tokens by id, their vectors float32 (tokens, dim); special and unused tokens are zero.

    `kept` is the share of the variance that the kept axes hold.
    """

    tokens: list[str]
    vectors: F32
    kept: float


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says: tokens by id, which are special, the ids put before and after a text."""

    tokens: list[str]
    special: frozenset[int]
    before: tuple[int, ...]
    after: tuple[int, ...]


def read_vocabulary(path: Path) -> tuple[Vocabulary, Any]:
    """The vocabulary and the tokenizer itself. Raises MissingExtraError without the package, DataError."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingExtraError("distilling needs the package 'tokenizers'; install featherweight[text]") from e
    try:
        tool: Any = Tokenizer.from_file(str(path))
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    except Exception as e:  # tokenizers raises plain Exception for whatever its file holds
        raise DataError(f"{path} is not a tokenizer.json ({e})") from e
    tool.no_padding()
    tool.no_truncation()
    ids = tool.get_vocab(with_added_tokens=True)
    tokens = [f"[{i}]" for i in range(max(ids.values(), default=-1) + 1)]
    for token, i in ids.items():
        tokens[i] = token
    special = {int(t["id"]) for t in added if t.get("special")}
    unused = {i for i, t in enumerate(tokens) if t.startswith("[unused")}
    framed = tool.encode("a").ids
    inner = tool.encode("a", add_special_tokens=False).ids
    at = next((i for i in range(len(framed)) if framed[i : i + len(inner)] == inner), 0)
    vocabulary = Vocabulary(tokens, frozenset(special | unused), tuple(framed[:at]), tuple(framed[at + len(inner) :]))
    return vocabulary, tool


def token_counts(tool: Any, texts: Iterable[str], rows: int) -> npt.NDArray[np.int64]:
    """How often each token comes in some texts."""
    found: Counter[int] = Counter()
    for text in texts:
        found.update(tool.encode(text, add_special_tokens=False).ids)
    return np.array([found.get(i, 0) for i in range(rows)], np.int64)


def distil(
    model: Path,
    vocabulary: Vocabulary,
    *,
    worker: Worker,
    dim: int = 256,
    counts: npt.NDArray[np.int64] | None = None,
    sif: float = SIF,
    threads: int = 1,
    progress: Progress | None = None,
) -> Distilled:
    """The table of a teacher in ONNX, whose outputs are sentence vectors (batch, width) or token states.

    `counts` of tokens give their probabilities; without, token i is taken to come 1 / (i + 1) times as often as the
    first. `sif`: 0 weighs all tokens alike. Raises ModelError where inputs or outputs are of another kind, RunError.
    """
    shown = progress or Silent()
    states = teacher_vectors(model, vocabulary, worker=worker, threads=threads, progress=shown)
    used = np.array([i not in vocabulary.special for i in range(len(vocabulary.tokens))])
    shares = probabilities(len(used), used, counts)
    vectors, kept = projected(states, used, dim)
    weights = sif / (sif + shares) if sif > 0 else np.ones(len(shares))
    return Distilled(vocabulary.tokens, (vectors * np.where(used, weights, 0)[:, None]).astype(np.float32), kept)


def teacher_vectors(
    model: Path, vocabulary: Vocabulary, *, worker: Worker, threads: int = 1, progress: Progress | None = None
) -> F32:
    """The teacher's vector (tokens, width) of each token alone, special ones left at zero."""
    shown = progress or Silent()
    asked = [i for i in range(len(vocabulary.tokens)) if i not in vocabulary.special]
    batches = [asked[a : a + BATCH] for a in range(0, len(asked), BATCH)]
    shown.start("asking the teacher for each token", len(batches))
    made: F32 | None = None
    for start in range(0, len(batches), CALL_BATCHES):
        part = batches[start : start + CALL_BATCHES]
        feeds = [_feeds(ids, vocabulary) for ids in part]
        if start == 0:
            feeds = [_fitting(model, f, worker) for f in feeds]
            names = list(feeds[0])
        feeds = [{n: f[n] for n in names} for f in feeds]
        answers = worker.call(ort.run_model, str(model), feeds, threads=threads, doing="asking the teacher")
        for ids, answer in zip(part, answers, strict=True):
            vectors = sentence_vectors(answer, len(ids), len(vocabulary.before))
            if made is None:
                made = np.zeros((len(vocabulary.tokens), vectors.shape[1]), np.float32)
            made[ids] = vectors
        shown.advance(len(part))
    if made is None:
        raise DataError("the tokenizer has no token that is not special, so there is nothing to distil")
    return made


def _feeds(ids: list[int], vocabulary: Vocabulary) -> dict[str, npt.NDArray[np.int64]]:
    rows = np.array([[*vocabulary.before, i, *vocabulary.after] for i in ids], np.int64)
    return {"input_ids": rows, "attention_mask": np.ones_like(rows), "token_type_ids": np.zeros_like(rows)}


def _fitting(model: Path, feeds: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    """Those of the three usual inputs that the model has. Raises ModelError if it wants others."""
    wanted = worker.call(_input_names, str(model), doing="looking at the teacher")
    unknown = sorted(set(wanted) - feeds.keys())
    if unknown:
        raise ModelError(f"a teacher's inputs must be among {', '.join(ROLES)}, but {model} also has {unknown[0]!r}")
    return {name: feeds[name] for name in wanted}


def _input_names(model: str) -> list[str]:
    """In the child: names of the inputs."""
    return [i.name for i in ort.session(model).inputs]


def sentence_vectors(answer: Mapping[str, npt.NDArray[Any]], n: int, at: int) -> F32:
    """(n, width) of one call: the output (n, width), preferring one named like a sentence's; else the state of the
    token at place `at` of an output (n, places, width). Raises ModelError.
    """
    flat = {k: v for k, v in answer.items() if v.ndim == 2 and len(v) == n and v.dtype.kind == "f"}
    named = [k for k in flat if "sentence" in k or "pool" in k or "embedding" in k]
    if flat:
        return np.asarray(flat[(named or list(flat))[0]], np.float32)
    states = [v for v in answer.values() if v.ndim == 3 and len(v) == n and v.dtype.kind == "f" and v.shape[1] > at]
    if not states:
        shapes = {k: v.shape for k, v in answer.items()}
        raise ModelError(f"a teacher must have an output (batch, width) or (batch, tokens, width), but got {shapes}")
    return np.asarray(states[0][:, at], np.float32)


def probabilities(
    rows: int, used: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.float64]:
    """Probability of each token (rows,), those that are not used left out of the sum; half a count for unseen ones."""
    often = 1.0 / np.arange(1, rows + 1) if counts is None else counts.astype(np.float64) + 0.5
    return np.asarray(np.where(used, often, 0) / max(float(often[used].sum()), 1e-30))


def projected(states: F32, used: npt.NDArray[np.bool_], dim: int) -> tuple[F32, float]:
    """Rows on the `dim` principal axes (rows, dim), centred, and the share of the variance they hold.

    All tokens count alike in the axes, as in Model2Vec; the centre is theirs too.
    """
    rows = states[used].astype(np.float64)
    mean = rows.mean(axis=0)
    values, axes = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    order = np.argsort(-values, kind="stable")[:dim]
    share = float(values[order].sum() / max(float(values.sum()), 1e-30))
    # The sign of an axis is free: its largest entry is made positive, so that machines agree.
    picked = axes[:, order]
    picked = picked * np.sign(picked[np.abs(picked).argmax(axis=0), np.arange(picked.shape[1])])
    return ((states - mean) @ picked).astype(np.float32), share


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file. Raises DataError naming the line that is not UTF-8."""
    from featherweight.embeddings.corpus import open_corpus

    for words in open_corpus(path):
        yield " ".join(words)

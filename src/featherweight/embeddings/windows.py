"""The sliding window of word2vec, step by step (Mikolov 2013, arXiv:1301.3781 and arXiv:1310.4546).

Every word of the sentence takes its turn as the centre; the words up to `window` places to its left and right are its
context. Skip-gram learns to predict each context word from the centre, CBOW the centre from all its context words.

What is random in training is here a function of numbers in [0, 1), so that every step can be worked out by hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from featherweight.errors import DataError

NOISE_POWER = 0.75  # word2vec draws negatives from count^0.75
MAX_WINDOW = 1000


@dataclass(frozen=True)
class Position:
    """One turn: `at` is the index of the centre, `reach` the window used, `context` the indices around, in order."""

    at: int
    reach: int
    context: tuple[int, ...]


def check_window(window: int) -> None:
    """Raises DataError unless the window is in 1..1000."""
    if not 1 <= window <= MAX_WINDOW:
        raise DataError(f"the window must be from 1 to {MAX_WINDOW} words to each side, but got {window}")


def slide(length: int, window: int, reaches: Sequence[int] | None = None) -> tuple[Position, ...]:
    """One Position for each of `length` words, in order; at the edges the context is what is there.

    `reaches`: the window of each position, if it is not `window` everywhere (see `dynamic_reach`). Raises DataError.
    """
    check_window(window)
    used = [window] * length if reaches is None else list(reaches)
    if len(used) != length or any(not 1 <= r <= window for r in used):
        raise DataError(f"reaches must be {length} numbers from 1 to {window}, but got {used}")
    return tuple(
        Position(i, r, tuple(j for j in range(max(0, i - r), min(length, i + r + 1)) if j != i))
        for i, r in enumerate(used)
    )


def skip_gram(words: Sequence[str], positions: Sequence[Position]) -> list[tuple[str, str]]:
    """All training pairs (centre, context), in the order in which the window reaches them."""
    return [(words[p.at], words[j]) for p in positions for j in p.context]


def cbow(words: Sequence[str], positions: Sequence[Position]) -> list[tuple[tuple[str, ...], str]]:
    """All training examples (contexts, centre); a position without context gives none."""
    return [(tuple(words[j] for j in p.context), words[p.at]) for p in positions if p.context]


def dynamic_reach(window: int, draw: float) -> int:
    """The window of one position: 1..window, all equally likely (`draw` in [0, 1)).

    This is how word2vec weighs near words more: a word d places away is in reach with probability
    (window - d + 1) / window.
    """
    return 1 + int(draw * window)


def reach_chances(window: int) -> list[float]:
    """Probability that the word 1, 2, ... window places away is used, with dynamic windows."""
    return [(window - d + 1) / window for d in range(1, window + 1)]


def keep_chance(count: int, total: int, threshold: float) -> float:
    """Probability that an occurrence of a word seen `count` times in `total` survives subsampling: at most 1.

    sqrt(t / f) + t / f with f = count / total, as word2vec's code has it (the paper writes sqrt(t / f) alone).
    """
    share = threshold * total / count
    return min(1.0, math.sqrt(share) + share)


def subsample(
    words: Sequence[str], counts: Mapping[str, int], threshold: float, draws: Iterator[float]
) -> tuple[int, ...]:
    """Indices of the words that stay: those whose chance is above their draw. Windows are laid over what stays.

    Raises DataError for a threshold that is not above 0.
    """
    if not threshold > 0:
        raise DataError(f"the threshold of subsampling must be above 0 (word2vec's is 1e-3), but got {threshold}")
    total = sum(counts.values())
    return tuple(i for i, w in enumerate(words) if keep_chance(counts[w], total, threshold) > next(draws))


def noise_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Probability of each word as a negative sample: count^0.75, normalised, in the order of `counts`."""
    powers = {w: c**NOISE_POWER for w, c in counts.items()}
    total = sum(powers.values())
    return {w: p / total for w, p in powers.items()}


def negatives(true: str, shares: Mapping[str, float], how_many: int, draws: Iterator[float]) -> tuple[str, ...]:
    """Words drawn as false answers to one pair; a draw of the true word is dropped, as in word2vec, so fewer come."""
    drawn = (_pick(shares, next(draws)) for _ in range(how_many))
    return tuple(w for w in drawn if w != true)


def _pick(shares: Mapping[str, float], draw: float) -> str:
    """The word at whose share the running sum passes `draw`."""
    passed, picked = 0.0, ""
    for word, share in shares.items():
        passed, picked = passed + share, word
        if draw < passed:
            break
    return picked


@dataclass(frozen=True)
class Lesson:
    """Everything about the windows of one sentence.

    `given` are all its words; `kept` the indices that survived subsampling, and `words` those words; positions and
    pairs are about `words`. `counts` are where chances come from: the sentence's own, or a corpus's. The last four
    are empty unless asked for: chances to be kept, to be in reach, to be a negative, and the negatives of each pair.
    """

    given: tuple[str, ...]
    window: int
    kept: tuple[int, ...]
    words: tuple[str, ...]
    positions: tuple[Position, ...]
    pairs: tuple[tuple[str, str], ...]
    examples: tuple[tuple[tuple[str, ...], str], ...]
    counts: Mapping[str, int]
    keep_chances: Mapping[str, float]
    reach_chances: tuple[float, ...]
    noise_shares: Mapping[str, float]
    negatives: tuple[tuple[str, ...], ...]


def lesson(
    words: Sequence[str],
    window: int,
    draws: Iterator[float],
    *,
    dynamic: bool = False,
    threshold: float | None = None,
    negative: int = 0,
    counts: Mapping[str, int] | None = None,
) -> Lesson:
    """Lay the window over `words` (after subsampling, if a threshold is given) and list what is learnt from it.

    `draws` are numbers in [0, 1), used in this order: one a word for subsampling, one a position for dynamic windows,
    `negative` for each pair. `counts` must hold every word. Raises DataError for an empty text or bad numbers.
    """
    check_window(window)
    if not words:
        raise DataError("the text must have at least one word, but it is empty; give a sentence in quotes")
    if negative < 0:
        raise DataError(f"the number of negatives must be at least 0, but got {negative}")
    known = dict(Counter(words)) if counts is None else dict(counts)
    for word in words:
        known.setdefault(word, 1)
    kept = tuple(range(len(words))) if threshold is None else subsample(words, known, threshold, draws)
    left = tuple(words[i] for i in kept)
    reaches = [dynamic_reach(window, next(draws)) for _ in left] if dynamic else None
    positions = slide(len(left), window, reaches)
    pairs = tuple(skip_gram(left, positions))
    shares = noise_shares(known) if negative else {}
    chances = {} if threshold is None else {
        w: keep_chance(known[w], sum(known.values()), threshold) for w in dict.fromkeys(words)
    }  # fmt: skip
    return Lesson(
        given=tuple(words),
        window=window,
        kept=kept,
        words=left,
        positions=positions,
        pairs=pairs,
        examples=tuple(cbow(left, positions)),
        counts=known,
        keep_chances=chances,
        reach_chances=tuple(reach_chances(window)) if dynamic else (),
        noise_shares=shares,
        negatives=tuple(negatives(true, shares, negative, draws) for _, true in pairs) if negative else (),
    )

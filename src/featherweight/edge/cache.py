"""Answers to repeated inputs: exact, bounded in entries, bytes and age."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from featherweight.edge.protocol import Array

Key = tuple[tuple[str, str, tuple[int, ...], bytes], ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept answer, where it came from, and when."""

    outputs: Mapping[str, Array]
    source: str
    at: float
    size_bytes: int


def key_of(feeds: Mapping[str, Array]) -> Key:
    """Names, types, shapes and all bytes: two inputs have one key only if they are the same."""
    return tuple(
        (n, a.dtype.str, a.shape, repr(a.tolist()).encode() if a.dtype == object else a.tobytes())
        for n, a in sorted(feeds.items())
    )


class Cache:
    """Least recently used goes first. Thread-safe; arrays are copied on the way in and out.

    Args:
        entries: most answers kept.
        size_bytes: of inputs and answers together.
        ttl_s: age at which an answer is forgotten.
        clock: seconds, steady.
    """

    def __init__(self, entries: int, size_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._entries, self._limit, self._ttl_s, self._clock = entries, size_bytes, ttl_s, clock
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: Key, accept: Callable[[str], bool]) -> tuple[dict[str, Array], str] | None:
        """The answer kept for `key` and its source, if young enough and from a source that is accepted."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return None
            if self._clock() - kept.at > self._ttl_s:
                self._drop(key)
                return None
            if not accept(kept.source):
                return None
            self._kept.move_to_end(key)
        return {n: a.copy() for n, a in kept.outputs.items()}, kept.source

    def put(self, key: Key, outputs: Mapping[str, Array], source: str) -> None:
        """Keep an answer, unless it alone is larger than the cache."""
        size = sum(len(k[3]) for k in key) + sum(a.nbytes for a in outputs.values())
        if size > self._limit:
            return
        kept = Kept({n: a.copy() for n, a in outputs.items()}, source, self._clock(), size)
        with self._lock:
            if key in self._kept:
                self._drop(key)
            self._kept[key] = kept
            self._size += size
            while len(self._kept) > self._entries or self._size > self._limit:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        self._size -= self._kept.pop(key).size_bytes

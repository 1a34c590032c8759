"""From text to words: split at white space, or by a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from featherweight.errors import DataError

Tokenizer = Callable[[str], Sequence[str]]


def by_space(text: str) -> list[str]:
    """Words between any Unicode white space."""
    return text.split()


def tokenizer(name: str | None, *, lower: bool = False) -> Tokenizer:
    """The tokenizer called `module:function` (text -> words), or the one that splits at white space.

    The function is looked for in installed packages and in the folder one works in. `lower` lowercases first.
    Raises DataError if there is no such function; what it returns is checked at each call.
    """
    split = by_space if name is None else _checked(_imported(name), name)
    return (lambda text: split(text.lower())) if lower else split


def _imported(name: str) -> Callable[[str], object]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise DataError(f"a tokenizer must be written module:function, but got {name!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise DataError(f"the tokenizer {name!r} cannot be imported: {e}") from e
    if not callable(found):
        raise DataError(f"the tokenizer {name!r} must be a function from text to words, but it is {found!r}")
    made: Callable[[str], object] = found
    return made


def _checked(split: Callable[[str], object], name: str) -> Tokenizer:
    def checked(text: str) -> list[str]:
        words = split(text)
        if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(w, str) for w in words):
            raise DataError(f"the tokenizer {name!r} must return a list of texts, but returned {words!r:.80}")
        return list(words)

    return checked

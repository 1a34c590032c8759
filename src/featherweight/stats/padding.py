"""Which places of a batch of texts are real: what lies behind the end of a text is computed, but no answer reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

#: Inputs that say it in the exporters' usual names, 1 for a token and 0 for padding.
MASKS = ("attention_mask", "input_mask")


def shown(feeds: Mapping[str, Any]) -> npt.NDArray[np.bool_] | None:
    """(batch, length), True where a token is; None where the feeds do not say, or leave nothing.

    Where a decoder is fed too, its places are not those of the mask.
    """
    if any(name.startswith("decoder") for name in feeds):
        return None
    for name in MASKS:
        mask = feeds.get(name)
        if mask is None or np.ndim(mask) != 2:
            continue
        held = np.asarray(mask)
        if held.dtype.kind in "iub" and held.any() and set(np.unique(held)) <= {0, 1}:
            return held.astype(bool)
    return None


def rows_shown(shape: tuple[int, ...], mask: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64] | None:
    """Indices of the real rows of an array (batch, length, k), its first two axes as one; None where all count."""
    if mask is None or len(shape) != 3 or shape[:2] != mask.shape or mask.all():
        return None
    if shape[0] == shape[1]:  # which axis is which cannot be told
        return None
    return np.flatnonzero(mask)

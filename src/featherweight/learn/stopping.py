"""When to stop: the best loss on validation data so far, and how long nothing better has come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: From this many times the best loss on, a rate does harm. EfficientNet-Lite0 with half of its operations, or few bits,
#: stayed below 1.04 and gained; MobileNetV2 with half of its operations went to 1.4 at once and never came back.
HARM = 1.1


@dataclass(frozen=True)
class Watch:
    """`best` loss at `best_step`; `since` checks without a better one; None of them before the first check."""

    best: float = math.inf
    best_step: int = -1
    since: int = 0

    def seen(self, step: int, loss: float) -> Watch:
        """After one more check. A loss that is not a number is never better."""
        if math.isfinite(loss) and loss < self.best:
            return Watch(loss, step, 0)
        return dataclasses.replace(self, since=self.since + 1)

    def stalled(self, patience: int, losses: Sequence[float]) -> bool:
        """True if `patience` checks brought nothing better and their `losses`, the latest last, do not even fall.

        A student that was solved for, not trained, gets worse while the rate is high and better as the rate falls: a
        run that is on its way back is not at its end.
        """
        if self.since < patience:
            return False
        window = losses[-patience:]
        half = len(window) // 2
        return not math.fsum(window[half:]) / (len(window) - half) < math.fsum(window[:half]) / max(half, 1)

    def harmed(self, loss: float) -> bool:
        """True if `loss` says that training undoes what the best weights had: far above the best, or no number."""
        return math.isfinite(self.best) and not loss <= HARM * self.best

    def is_best(self, step: int) -> bool:
        """True if the best was seen at this step."""
        return self.best_step == step

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an infinite best becomes null."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "since": self.since,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Watch:
        """Read `to_json`'s form."""
        best = raw["best"]
        return cls(math.inf if best is None else float(best), int(raw["best_step"]), int(raw["since"]))

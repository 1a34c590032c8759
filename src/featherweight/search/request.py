"""What the user asked, resolved from text to numbers once the original is known."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from featherweight.core import Budget, Objective
from featherweight.data import InputSpec
from featherweight.errors import BudgetError, ModelError, TechniqueError
from featherweight.quantities import parse_count, parse_duration, parse_fraction, parse_latency, parse_size
from featherweight.techniques import Technique

Goal = Literal["plain-int8", "minimize", "fit"]
# Where the user sets no limit on the drop but minimises something else, this one holds and is reported.
DEFAULT_MAX_DROP = 0.01
DEFAULT_CANDIDATES = 18
MAX_CALIBRATION = 128
# Solving the weights of a changed structure anew gains from more samples than ranges and rounding do.
MAX_RECOVERY = 256
# Texts give a layer few rows a sample, where a picture gives thousands.
MAX_RECOVERY_TEXTS = 2048
# Weights are always solved anew by ridge regression after a change of structure; distill: the original teaches too.
RECOVERIES = ("ridge", "distill")


@dataclass(frozen=True)
class Request:
    """The arguments of one run as given; text is parsed by `budget`."""

    model: Path
    data: Any
    out: Path | None = None
    calibration: Any = None
    metric: str | None = None
    max_size: str | float | None = None
    max_latency: str | float | None = None
    max_peak_memory: str | float | None = None
    max_drop: str | float | None = None
    minimize: Objective | None = None
    techniques: tuple[str, ...] | None = None
    keep_float: tuple[str, ...] = ()
    preprocess: Any = None
    tokenizer: Path | None = None
    batch_size: int = 1
    profile: str | Path | None = None
    threads: int = 1
    seed: int = 0
    time_budget: str | float | None = None
    max_candidates: int = DEFAULT_CANDIDATES
    max_macs: str | float | None = None
    target_token: str | None = dataclasses.field(default=None, repr=False)
    target_token_file: Path | None = None
    target_ca: Path | None = None
    recover: str = "ridge"

    def __post_init__(self) -> None:
        if self.minimize is not None and self.minimize not in get_args(Objective):
            raise BudgetError(f"minimize must be one of {', '.join(get_args(Objective))}, but got {self.minimize!r}")
        if self.recover not in RECOVERIES:
            raise BudgetError(f"recover must be one of {', '.join(RECOVERIES)}, but got {self.recover!r}")
        for name in ("batch_size", "threads", "max_candidates"):
            if getattr(self, name) < 1:
                raise BudgetError(f"{name} must be at least 1, but got {getattr(self, name)}")
        if self.max_macs is not None:
            parse_count(self.max_macs, 10**12)  # refused here; the original's count is known only later

    @property
    def limits_resources(self) -> bool:
        """True if size, latency, memory or MACs are limited."""
        limits = (self.max_size, self.max_latency, self.max_peak_memory, self.max_macs)
        return any(v is not None for v in limits)

    @property
    def goal(self) -> Goal:
        """What kind of answer is wanted.

        Nothing asked: a plain 8-bit model. A resource limit and no objective: the most accurate model that fits.
        Otherwise the objective is minimised.
        """
        if self.minimize is not None:
            return "minimize"
        if self.limits_resources:
            return "fit"
        return "plain-int8" if self.max_drop is None else "minimize"

    def budget(self, original_bytes: int) -> Budget:
        """The limits in bytes and milliseconds. Raises BudgetError on malformed or contradictory ones.

        `max_macs` is left to whoever has counted the original.
        """
        ms, ratio = (None, None) if self.max_latency is None else parse_latency(self.max_latency)
        drop = None if self.max_drop is None else parse_fraction(self.max_drop)
        if drop is None and self.goal != "fit" and self.minimize != "drop":
            drop = DEFAULT_MAX_DROP
        objectives: dict[Goal, Objective] = {
            "plain-int8": "latency",
            "fit": "drop",
            "minimize": self.minimize or "size",
        }
        return Budget(
            max_size_bytes=None if self.max_size is None else parse_size(self.max_size, original_bytes),
            max_latency_ms=ms,
            max_latency_ratio=ratio,
            max_peak_bytes=None if self.max_peak_memory is None else parse_size(self.max_peak_memory),
            max_drop=drop,
            minimize=objectives[self.goal],
        )

    @property
    def time_budget_s(self) -> float | None:
        """Seconds the search may take, or None."""
        return None if self.time_budget is None else parse_duration(self.time_budget)

    def asked(self, model_sha256: str) -> dict[str, Any]:
        """What a resumed run must ask again: everything but where and how long."""
        skipped = {"model", "out", "time_budget", "max_candidates", "target_token", "target_token_file", "target_ca"}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}
        return json.loads(json.dumps({**fields, "model_sha256": model_sha256}, default=_name))  # type: ignore[no-any-return]


def _name(value: Any) -> str:
    """Stable text for what JSON cannot hold; a callable is known by its name."""
    if callable(value):
        return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__name__)}"
    return str(value)


def chosen_techniques(wanted: Sequence[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """Names of the techniques to use; all by default. Raises TechniqueError with near matches."""
    names = tuple(known)
    if wanted is None:
        return names
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
            raise TechniqueError(f"there is no technique called {name!r}; {hint}")
    return tuple(dict.fromkeys(wanted))


def most_calibration(request: Request, techniques: Mapping[str, Technique], inputs: Sequence[InputSpec]) -> int:
    """Calibration samples used at most."""
    structural = request.goal != "plain-int8" and any(t.stage == "structure" for t in techniques.values())
    if not structural:
        return MAX_CALIBRATION
    tokens = all(len(spec.shape or (0,) * 3) <= 2 and spec.dtype.kind in "iub" for spec in inputs)
    return MAX_RECOVERY_TEXTS if tokens else MAX_RECOVERY


def matching_nodes(patterns: Sequence[str], node_names: Sequence[str]) -> frozenset[str]:
    """Names of nodes that match any of the shell-style patterns. Raises ModelError if a pattern matches nothing."""
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(node_names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, node_names, n=3, cutoff=0.4)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"the model has {len(node_names)} nodes; see `inspect`"
            )
            raise ModelError(f"keep-float pattern {pattern!r} matches no node; {hint}")
        found.update(hits)
    return frozenset(found)

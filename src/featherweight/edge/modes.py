"""Which way a request should take, by what was measured: no clock, no network, no threads of its own.

Latency of each way is followed as TCP follows its round trips (Jacobson 1988, RFC 6298): a moving average and a moving
mean deviation. Loss is a moving share. A way's expected time is its average, or the deadline with the probability
that the answer is lost. The way changes only when another is clearly better, and not too soon after the last change;
a link that is down is left at once and taken again only after several good probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["local", "split", "remote"]
Prefer = Literal["server", "fastest"]


@dataclass(slots=True)
class Track:
    """Moving estimates of one way, in seconds; None until measured."""

    mean_s: float | None = None
    deviation_s: float = 0.0
    loss: float = 0.0
    samples: int = 0

    def took(self, seconds: float) -> None:
        """An answer came after `seconds`."""
        if self.mean_s is None:
            self.mean_s, self.deviation_s = seconds, seconds / 2
        else:
            self.deviation_s += 0.25 * (abs(seconds - self.mean_s) - self.deviation_s)
            self.mean_s += 0.2 * (seconds - self.mean_s)
        self.loss *= 0.9
        self.samples += 1

    def lost(self) -> None:
        """No answer came in time."""
        self.loss += 0.1 * (1.0 - self.loss)

    def late_s(self) -> float:
        """A time that most answers keep."""
        return (self.mean_s or 0.0) + 2 * self.deviation_s

    def expected_s(self, deadline_s: float) -> float:
        """Expected time of an answer, a lost one counted as the deadline; infinite if never measured."""
        if self.mean_s is None:
            return float("inf")
        return (1 - self.loss) * self.mean_s + self.loss * max(deadline_s, self.mean_s)


@dataclass(slots=True)
class Chooser:
    """Chooses among the ways a request may take. The caller holds a lock around each call.

    `better`: another way must be expected to take less than this part of the present one. `dwell_s`: time between two
    changes, except away from a link that is down. `good_probes`: in a row, before a link counts as up again.
    `failures`: lost requests in a row that mean the link is down (one refused connection does).
    """

    modes: Sequence[Mode]
    deadline_s: float
    prefer: Prefer = "server"
    better: float = 0.8
    dwell_s: float = 2.0
    good_probes: int = 2
    failures: int = 2
    mode: Mode = "local"
    up: bool = False
    reason: str = "the server has not been reached yet"
    switches: int = 0
    tracks: dict[Mode, Track] = field(init=False)
    _met: bool = False
    _good: int = 0
    _failed: int = 0
    _changed: float = float("-inf")

    def __post_init__(self) -> None:
        """One track a mode."""
        self.tracks = {mode: Track() for mode in self.modes}

    def choose(self, now: float) -> Mode:
        """The way for a request that starts `now` (seconds of any steady clock)."""
        best = self._best()
        if best != self.mode:
            leaves_dead_link = not self.up and self.mode != "local"
            rested = now - self._changed >= self.dwell_s
            if leaves_dead_link or (rested and self._clearly(best)):
                self.mode, self._changed = best, now
                self.switches += 1
        return self.mode

    def took(self, mode: Mode, seconds: float) -> None:
        """A request's answer came in `seconds`."""
        self.tracks[mode].took(seconds)
        if mode != "local":
            self._failed = 0

    def failed(self, mode: Mode, *, kind: str, reason: str) -> None:
        """A request's answer will not come. `kind` as in LinkError; 'busy' is the server's load, not the link."""
        self.tracks[mode].lost()
        self.reason = reason
        if kind == "busy":
            return
        self._failed += 1
        if kind in ("connect", "refused", "protocol") or self._failed >= self.failures:
            self.down(reason)

    def down(self, reason: str) -> None:
        """The link is not to be used until probes succeed."""
        self.up, self._good, self.reason = False, 0, reason

    def probed(self, times_s: dict[Mode, float]) -> None:
        """A probe succeeded, with the seconds each way took. The first ever is believed alone."""
        for mode, seconds in times_s.items():
            track = self.tracks[mode]
            if not self.up and self._good == 0:
                track.mean_s, track.loss = None, 0.0  # what was measured before the link went down says nothing now
            track.took(seconds)
        self._good += 1
        if not self.up and (not self._met or self._good >= self.good_probes):
            self._met = True
            self.up, self._failed, self.reason = True, 0, ""

    def _best(self) -> Mode:
        """The way that would be taken were there no memory of the present one."""
        away: list[Mode] = [m for m in self.modes if m != "local"]
        if not self.up or not away:
            return "local"
        nearest = min(away, key=lambda m: self.tracks[m].expected_s(self.deadline_s))
        if self.prefer == "fastest":
            here = self.tracks["local"].expected_s(self.deadline_s)
            return nearest if self.tracks[nearest].expected_s(self.deadline_s) < here else "local"
        return nearest if self._in_time(nearest, 1.0) else "local"

    def _in_time(self, mode: Mode, share: float) -> bool:
        """Whether most answers of `mode` come within `share` of the deadline."""
        track = self.tracks[mode]
        return track.mean_s is not None and track.late_s() <= share * self.deadline_s and track.loss < 0.5 * share

    def _clearly(self, best: Mode) -> bool:
        """Whether `best` beats the present way by the margin that a change needs."""
        if self.prefer == "server" and "local" in (best, self.mode):
            return best == "local" or self._in_time(best, self.better)
        now, then = (self.tracks[m].expected_s(self.deadline_s) for m in (self.mode, best))
        return then < self.better * now

"""A request on its way to the server while somebody waits for it: answered once, or given up once."""

from __future__ import annotations

import threading

from featherweight.edge.protocol import Array


class Flight:
    """Shared by the thread that waits and the one that travels. The first of answer, failure and giving up counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._outputs: dict[str, Array] | None = None
        self._given_up = False
        self.error: Exception | None = None

    def answer(self, outputs: dict[str, Array]) -> bool:
        """The answer has come. False if nobody waits for it any more."""
        with self._lock:
            if not self._given_up:
                self._outputs = outputs
        self._wake.set()
        return not self._given_up

    def fail(self, error: Exception) -> None:
        """No answer will come."""
        self.error = error
        self._wake.set()

    def hurry(self) -> None:
        """Wake who waits: there is reason not to wait any longer."""
        self._wake.set()

    def wait(self, seconds: float) -> dict[str, Array] | None:
        """The answer, if it comes in time and nothing speaks against waiting."""
        self._wake.wait(max(seconds, 0.0))
        return self._outputs

    def settle(self) -> dict[str, Array] | None:
        """The answer if it has come; if not, give it up for good."""
        with self._lock:
            self._given_up = self._outputs is None
            return self._outputs

    def last_chance(self, seconds: float) -> dict[str, Array] | None:
        """Wait again, until the answer or the failure is there, whatever woke us before."""
        if self._outputs is None and self.error is None:
            self._wake.clear()
            self._wake.wait(max(seconds, 0.0))
        return self.settle()

"""How many sandboxes to keep ready where each serves a bounded number of sessions: pure, told of every lease and start.

As many as are waited for, and those that will be asked for while the next one starts, with half as many again; at least
one, at most as many as the pool has places. Times are seconds on one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Final

WINDOW_S: Final = 10.0
"""Demand is what was leased in the last seconds."""
SPARE: Final = 1.5
_SMOOTHING: Final = 0.3


class Demand:
    """See the module's docstring."""

    def __init__(self, most: int) -> None:
        self.waiting = 0
        """Episodes that wait for a sandbox now."""
        self._most = most
        self._leases: deque[float] = deque()
        self._start_s = 0.0

    def leased(self, now: float) -> None:
        """A sandbox was taken."""
        self._leases.append(now)
        self._forget(now)

    def started(self, seconds: float) -> None:
        """A sandbox took this long to start."""
        self._start_s += (seconds - self._start_s) * (_SMOOTHING if self._start_s else 1.0)

    def target(self, now: float) -> int:
        """How many should be ready, or starting."""
        self._forget(now)
        ahead = ceil(len(self._leases) / WINDOW_S * self._start_s * SPARE)
        return min(self._most, self.waiting + max(ahead, 1))

    def _forget(self, now: float) -> None:
        while self._leases and self._leases[0] <= now - WINDOW_S:
            self._leases.popleft()

    def __repr__(self) -> str:
        return f"<Demand waiting={self.waiting} leases={len(self._leases)} start={self._start_s:.2f}s>"

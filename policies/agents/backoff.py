"""When to ask a server again: exponential backoff with jitter, and the server's own word on it, bounded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

from orchestrator.errors import UsageError

_LARGEST_EXPONENT: Final = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays in seconds. The n-th retry waits first_s * 2**n, at most cap_s, of which the upper half is random."""

    max_retries: int = 5
    first_s: float = 0.5
    cap_s: float = 30.0
    retry_after_cap_s: float = 120.0
    """No server makes a call wait longer than this."""

    def __post_init__(self) -> None:
        for name in ("max_retries", "first_s", "cap_s", "retry_after_cap_s"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}; it must be finite and at least 0")

    def delay(self, retry: int, draw: float, retry_after_s: float | None = None) -> float:
        """Seconds before retry number `retry` (from 0); `draw` is uniform in [0, 1).

        What the server asked for is waited out first, then a random part of the backoff, so that clients that were
        turned away together do not come back together.
        """
        backoff = min(self.cap_s, self.first_s * 2.0 ** min(retry, _LARGEST_EXPONENT))
        if retry_after_s is None:
            return backoff * (0.5 + draw / 2)
        return min(self.retry_after_cap_s, retry_after_s) + backoff * draw


def read_retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: seconds or a date); None if it says nothing.

    `now` is the wall clock in seconds.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = _until(value, now)
    return seconds if 0 <= seconds < float("inf") else None


def _until(date: str, now: float) -> float:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return float("nan")
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, moment.timestamp() - now)

"""How a service says no: a status, a sentence, and when to come back. The one place where errors become statuses.

400 and 422 the request is wrong; 401 no or another token; 404 no such instance, sandbox or route; 408 the body came too
slowly; 409 the id is taken; 413 too large; 429 a quota of the client's own; 503 no room or no sandbox now. 429 and 503
say when to try again. 500 is a defect: of the environment, whose words are given, or of the service, which only says
that it is logged.
"""

from __future__ import annotations

import logging
from typing import Final

from orchestrator.errors import ActionKilled, RolloutError, RunFailed, SandboxError, SandboxRefused, UsageError
from orchestrator.types import FailureKind

RETRY_S: Final = 2
"""Seconds after which it is worth another try, where nothing better is known."""
_CAP: Final = 2000
_INFRASTRUCTURE: Final = frozenset(
    {FailureKind.SANDBOX_LOST, FailureKind.SANDBOX_HUNG, FailureKind.SANDBOX_START, FailureKind.PROTOCOL}
)

log = logging.getLogger(__name__)


class Refusal(RolloutError):
    """A request that gets no result. `retry_after` is in seconds."""

    def __init__(self, status: int, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail[:_CAP])
        self.status = status
        self.retry_after = retry_after


def busy(detail: str) -> Refusal:
    """No room now, whoever asks."""
    return Refusal(503, detail, retry_after=RETRY_S)


def over_quota(detail: str) -> Refusal:
    """The client's own quota is used up."""
    return Refusal(429, detail, retry_after=RETRY_S)


def refusal(error: Exception) -> Refusal:
    """What a failed call is answered with."""
    match error:
        case Refusal():
            return error
        case ActionKilled():
            return Refusal(422, error.failure.message)
        case SandboxRefused():
            defect = error.failure.kind in {FailureKind.ENVIRONMENT, FailureKind.BAD_REWARD}
            return Refusal(500 if defect else 400, error.failure.message)
        case SandboxError() if error.failure.kind in _INFRASTRUCTURE:
            return busy(f"the sandbox failed: {error.failure.message}")
        case SandboxError():
            return Refusal(500, error.failure.message)
        case UsageError():
            return Refusal(400, str(error))
        case RunFailed() | TimeoutError():
            return busy(str(error) or "the call took too long")
        case _:
            log.error("a request failed inside the service", exc_info=error)
            return Refusal(500, "the service failed at this request; its log says more")

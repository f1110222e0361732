"""What a failed call of a service means: a loss, which replay mends, or a refusal. Pure."""

from __future__ import annotations

from typing import Final

from backends.agentscope.http import NoRoute, Unprocessable
from backends.server.wire import ErrorCode
from orchestrator.errors import SandboxError, SandboxLost, SandboxRefused, Unavailable, UsageError
from orchestrator.types import Failure, FailureKind

_GONE: Final = "not found"
_DIED: Final = ("ActorDiedError", "ActorUnavailableError", "The actor died", "actor is dead", "WorkerCrashedError")


def told(error: UsageError | SandboxError, stage: str) -> SandboxError:
    """What the service said, as a loss of the instance or a refusal.

    Where the connection failed, nobody knows whose doing it was: that call is no suspect. An instance is a process of
    its own at the service, so that its death is.
    """
    if isinstance(error, Unavailable):
        return SandboxError(Failure(FailureKind.SANDBOX_LOST, stage, str(error), retryable=True))
    if isinstance(error, NoRoute):
        return SandboxError(Failure(FailureKind.PROTOCOL, stage, str(error)))
    if isinstance(error, Unprocessable) and stage != "open":
        return SandboxLost(Failure(FailureKind.SANDBOX_LOST, stage, str(error)), suspect=True)
    if isinstance(error, UsageError):
        if stage != "open" and _GONE in str(error):
            return SandboxLost(Failure(FailureKind.SANDBOX_LOST, stage, str(error)), suspect=False)
        failure = Failure(FailureKind.ENVIRONMENT, stage, str(error))
        return SandboxRefused(failure, code=ErrorCode.BAD_REQUEST)
    failure = Failure(error.failure.kind, stage, error.failure.message, error.failure.retryable)
    if failure.kind is FailureKind.SANDBOX_LOST:
        return SandboxLost(failure, suspect=False)
    if failure.kind is FailureKind.SANDBOX_HUNG:
        return SandboxLost(failure, suspect=True)
    if failure.kind is FailureKind.ENVIRONMENT:
        if any(word in failure.message for word in _DIED):
            return SandboxLost(Failure(FailureKind.SANDBOX_LOST, stage, failure.message), suspect=True)
        return SandboxRefused(failure, code=ErrorCode.ENVIRONMENT)
    return SandboxError(failure)

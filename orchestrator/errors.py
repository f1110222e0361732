"""The error hierarchy, and `policy_failure`, which turns a policy's own exception into ours.

    RolloutError
    +-- UsageError              the caller's mistake; the message says what to do (exit code 2 on the command line)
    |   +-- RunExists           the run directory is unfinished: resume it
    |   +-- RunBusy             another live process owns the run directory
    |   +-- SchemaMismatch      a store or journal of another schema version
    |   +-- EnvironmentChanged  the environment's digest is not the recorded one
    |   +-- UnknownName         an environment, split, task or policy that does not exist
    |   +-- Unavailable         exists, but cannot run here; the message says what it needs
    +-- SandboxError            carries a Failure; the engine decides by its kind
    |   +-- SandboxLost         the sandbox ended; replay recovers
    |   +-- SandboxRefused      the sandbox answered with an error; `code` is the wire's
    |   +-- ActionKilled        the call itself ended its sandbox, proven alone; the episode stands where it stood
    +-- PolicyError             the policy failed; carries a Failure
    +-- StoreError              the store cannot go on (disk full, locked, damaged): the run stops, nothing is lost
    +-- RunFailed               the run cannot go on (no sandbox starts): stopped, nothing is lost, resume later
    +-- ClaimLost               an ack, nack or extend of a claim whose lease has passed to another worker
    +-- ConformanceError        a backend, environment or queue breaks its contract (orchestrator.testing)

Typed errors pass through every boundary unchanged.
"""

from __future__ import annotations

from orchestrator.types import Failure, FailureKind


class RolloutError(Exception):
    """The base of every error of this project."""


class UsageError(RolloutError):
    """The caller's mistake. The message says what to do next."""


class RunExists(UsageError):
    """The run directory holds an unfinished run."""


class RunBusy(UsageError):
    """Another live process owns the run directory."""


class SchemaMismatch(UsageError):
    """A file was written by another schema version."""


class EnvironmentChanged(UsageError):
    """The environment is not the one that the run was recorded with."""


class UnknownName(UsageError):
    """A name that does not exist; the message lists those that do."""


class Unavailable(UsageError):
    """It exists but cannot run here; the message says what it needs."""


class SandboxError(RolloutError):
    """A failure on the sandbox's side of the wire."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind} at {failure.stage}: {failure.message}")
        self.failure = failure


class SandboxLost(SandboxError):
    """The sandbox is gone. `suspect` is True where the call that raises was unanswered at the death."""

    def __init__(self, failure: Failure, *, suspect: bool) -> None:
        super().__init__(failure)
        self.suspect = suspect


class SandboxRefused(SandboxError):
    """The sandbox answered a call with an error; the session may still live. `code` is the wire's error code."""

    def __init__(self, failure: Failure, *, code: str) -> None:
        super().__init__(failure)
        self.code = code


class ActionKilled(SandboxError):
    """A call to a driven episode that ends every sandbox it is tried in. The episode stands where it stood before."""


class PolicyError(RolloutError):
    """The policy failed to decide."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure


class StoreError(RolloutError):
    """The store cannot go on; the message says what to do, and `rollout resume` goes on afterwards."""


class RunFailed(RolloutError):
    """The run cannot go on; the message says why. What was collected is durable; `rollout resume` goes on."""


class ClaimLost(RolloutError):
    """The lease of a claim ran out and the group went to another worker."""


class ConformanceError(RolloutError):
    """A backend, environment or queue breaks its contract."""


def policy_failure(error: BaseException, stage: str) -> PolicyError:
    """The one form in which a policy's own exception leaves an episode. Its text may hold anything; ours is UTF-8."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return PolicyError(Failure(FailureKind.POLICY, stage, message.encode("utf-8", "backslashreplace").decode()))


def first_error(errors: BaseExceptionGroup[RolloutError]) -> RolloutError:
    """The first leaf: the others follow from it."""
    for error in errors.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")

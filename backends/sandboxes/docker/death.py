"""What the daemon says of a container's end, as a failure with its true cause.

The first process passes on how the server ended: 128 and the signal's number, or the server's own code. An exit code
alone is ambiguous (137 is also what a full memory leaves), so the daemon's word on memory is asked first.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from backends.sandboxes.docker.port import ContainerState

_SIGNALLED: Final = 128


def describe(state: ContainerState, memory_mb: int) -> Failure:
    """Why a container that has ended did so; `memory_mb` is what it was allowed."""
    number = state.exit_code - _SIGNALLED
    if number == signal.SIGALRM:
        message = "the server's own timer ended it: a step ran over its time limit"
        return Failure(FailureKind.SANDBOX_HUNG, "call", message)
    return Failure(FailureKind.SANDBOX_LOST, "call", _words(state, number, memory_mb))


def _words(state: ContainerState, number: int, memory_mb: int) -> str:
    if state.oom_killed and number == signal.SIGKILL:
        return f"the server was killed for memory: its container may use {memory_mb} MiB"
    if number in set(signal.Signals):
        return f"the server died of {signal.Signals(number).name}"
    if state.error:
        return f"the container failed: {state.error}"
    return f"the server exited with code {state.exit_code}"

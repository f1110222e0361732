"""What this machine knows of an environment that somebody else serves: whether it is deterministic, and its solutions.

Owns the sandbox that solutions come from, this machine's own environment of that name, started when the first one is
asked for. Solutions that were given take its place: a server may grade by other data than this machine's environment.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from backends.environments.catalog import find
from backends.sandboxes.local import LocalBackend
from backends.server.wire import ErrorCode
from orchestrator.errors import SandboxRefused, UnknownName, UsageError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.sandboxes.link import LinkedSandbox
    from orchestrator.types import RunId


class Known:
    """See the module's docstring. Configure it, enter it, ask it for `solution`."""

    def __init__(self, environment: str, given: Mapping[str, Sequence[bytes]] | None) -> None:
        self.asked = False
        """Whether solutions were asked for."""
        self._environment = environment
        self._given = given
        self._own = LocalBackend(environment) if given is None and is_known(environment) else None
        self._source: LinkedSandbox | None = None
        self._starting = asyncio.Lock()
        self._stack = AsyncExitStack()

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`. Raises UsageError where solutions are asked for and nobody here has them."""
        if with_solutions and self._own is None and self._given is None:
            raise UsageError(
                f"nobody here knows solutions of {self._environment!r}: give them with --solutions FILE, or choose "
                "another policy"
            )
        self.asked = with_solutions
        if self._own is not None:
            self._own.configure(run=run, with_solutions=with_solutions, logs=logs, call_limit_s=call_limit_s)

    async def __aenter__(self) -> Self:
        if self.asked and self._own is not None:
            await self._stack.enter_async_context(self._own)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def solution(self, task: str) -> Sequence[bytes]:
        """The known actions of a task. Raises SandboxRefused where there are none, SandboxError."""
        if self._given is not None:
            if (actions := self._given.get(task)) is None:
                failure = Failure(FailureKind.UNKNOWN_TASK, "solution", f"no solution of {task} was given")
                raise SandboxRefused(failure, code=ErrorCode.UNKNOWN_TASK)
            return actions
        assert self._own is not None, "configured"
        async with self._starting:
            if self._source is None or self._source.lost.done():
                self._source = await self._own.create()
        return await self._source.solution(task)


def is_known(environment: str) -> bool:
    """Whether this machine has an environment of that name that its own processes may serve."""
    try:
        return not find(environment).runs_code
    except UnknownName:
        return False


def is_deterministic(environment: str) -> bool:
    """Whether a lost episode of it may be rebuilt, as far as this machine knows."""
    return is_known(environment) and find(environment).deterministic

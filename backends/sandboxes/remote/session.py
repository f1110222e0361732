"""One episode on a service of AgentScope's protocol: a `Session` over plain HTTP, whose instance the sandbox keeps.

Always true: a call ends with its answer, its time or the sandbox's loss, whichever comes first; the service grades at
most once between two steps by the same parameters; a released session calls no more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from backends.sandboxes.remote.messages import as_text, graded, stepped
from backends.server.wire import ErrorCode
from orchestrator.errors import SandboxLost, SandboxRefused
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.sandboxes.remote.instances import ServiceSandbox
    from orchestrator.types import Evaluation, Observation

T = TypeVar("T")


class ServiceSession:
    """One instance. Satisfies `orchestrator.protocols.Session`."""

    __slots__ = ("_closed", "_grades", "_lost", "_sandbox", "_timeout_s", "creating", "id")

    def __init__(self, sandbox: ServiceSandbox, instance: str, timeout_s: float) -> None:
        self._sandbox = sandbox
        self.id = instance
        self._timeout_s = timeout_s
        self._closed = False
        self._grades: dict[bytes, Evaluation] = {}
        """By parameters, since the last step."""
        self._lost: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        self.creating: asyncio.Task[Observation] | None = None

    async def step(self, action: bytes) -> Observation:
        """See `Session.step`."""
        self._grades.clear()
        return stepped(await self._call("step", {"messages": as_text(action)}))

    async def replay(self, actions: Sequence[bytes]) -> list[Observation]:
        """See `Session.replay`: one after the other, as the service answers."""
        return [await self.step(action) for action in actions]

    async def evaluate(self, params: Mapping[str, object] | None = None) -> Evaluation:
        """See `Session.evaluate`. Asked once between two steps: the service's own grading is not idempotent."""
        given = dict(params or {})
        by = orjson.dumps(given, option=orjson.OPT_SORT_KEYS)
        if by not in self._grades or self._closed:
            self._grades[by] = graded(await self._call("evaluate", {"params": given}))
        return self._grades[by]

    async def _call(self, stage: str, body: Mapping[str, Any]) -> Any:
        """A call that ends with the sandbox: its answer, its deadline or the sandbox's loss."""
        if self._sandbox.lost.done():
            raise SandboxLost(self._sandbox.lost.result(), suspect=False)
        if self._closed:
            failure = Failure(FailureKind.PROTOCOL, stage, "the session was released; open a new one")
            raise SandboxRefused(failure, code=ErrorCode.UNKNOWN_SESSION)
        call = self._sandbox.call(stage, stage, self.id, body, self._timeout_s)
        calling = asyncio.create_task(call, name=f"{stage}-{self.id}")
        try:
            return await self.answer(stage, calling, self._timeout_s)
        finally:
            if not calling.done():
                calling.cancel()
                await asyncio.wait({calling})

    async def answer(self, stage: str, calling: asyncio.Task[T], within_s: float) -> T:
        """What a call is answered, unless its time or the sandbox ends before. The call itself goes on."""
        either: set[asyncio.Future[Any]] = {calling, self._lost}
        await asyncio.wait(either, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done() and (not calling.done() or calling.cancelled()):
            raise SandboxLost(self._lost.result(), suspect=True)
        if calling.done():
            return calling.result()
        self._sandbox.doubt()
        message = f"no answer within {within_s:g} s: the instance is given up"
        raise SandboxLost(Failure(FailureKind.SANDBOX_HUNG, stage, message), suspect=True)

    def abandon(self, failure: Failure) -> None:
        """The sandbox is lost: whoever waits for an answer is told."""
        if not self._lost.done():
            self._lost.set_result(failure)

    def close(self) -> None:
        """See `Session.close`."""
        if not self._closed:
            self._closed = True
            self._sandbox.forget(self)

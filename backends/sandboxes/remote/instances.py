"""An environment service of AgentScope's protocol as a `Sandbox`, over plain HTTP.

Owns the instances that were asked for. Always true: an instance has an id of our own before it is asked for, so that
no other call names it; a call without an answer loses its instance and is never repeated; one that the service had no
room for was not run, and is sent again when the service says so, within its time; an instance that was asked for is
released, also where whoever asked has gone; a service that does not answer any more is lost with all its instances.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from backends.agentscope.http import Busy, Channel, NoRoute, Unreachable
from backends.sandboxes.remote.failures import told
from backends.sandboxes.remote.messages import malformed, opened
from backends.sandboxes.remote.session import ServiceSession
from backends.server.wire import ErrorCode
from orchestrator.errors import SandboxError, SandboxLost, SandboxRefused, Unavailable, UnknownName, UsageError
from orchestrator.protocols import SandboxStatistics
from orchestrator.types import EnvironmentInfo, Failure, FailureKind, TaskList

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from orchestrator.types import EpisodeSpec, Observation, SandboxId

log = logging.getLogger(__name__)

CREATIONS: Final = 4
"""Creations under way at once: the service starts a process for each, and as many at a time as it has cores."""
MAX_TURNS: Final = 200
"""Actions an episode: the service itself has no bound."""
CREATE_S: Final = 300.0
"""A creation may wait long at a busy service; steps have the run's own limit."""
RELEASE_S: Final = 10.0
PROBE_S: Final = 5.0
"""After a call that broke off: within this time the service must say that it is well."""
_RELEASES: Final = 3
"""How often a release is tried: it may be repeated, unlike a step."""
_RELEASE_PAUSE_S: Final = 0.5


_DOUBTFUL: Final = frozenset({FailureKind.SANDBOX_LOST, FailureKind.SANDBOX_HUNG})


class Admission:
    """What all sandboxes of one service share: how many instances live, and how many are being created."""

    def __init__(self, instances: int) -> None:
        self.slots = asyncio.Semaphore(instances)
        self.creations = asyncio.Semaphore(CREATIONS)


def described(environment: str, identity: str, *, deterministic: bool) -> EnvironmentInfo:
    """What a service of AgentScope's does not say of itself; `identity` is all that is known of its content."""
    return EnvironmentInfo(
        name=environment,
        digest=blake2b(f"env_service {identity}".encode(), digest_size=8).hexdigest(),
        isolation="process",
        deterministic=deterministic,
        runs_code=False,
        max_turns=MAX_TURNS,
    )


class ServiceSandbox:
    """The service, as one sandbox of the run. Several may be of one service: each has its own instances."""

    def __init__(
        self,
        sandbox: SandboxId,
        info: EnvironmentInfo,
        channel: Channel,
        admission: Admission,
        solutions: Callable[[str], Awaitable[Sequence[bytes]]] | None,
        cause: Callable[[], Awaitable[Failure | None]] | None = None,
    ) -> None:
        self.id = sandbox
        self.info = info
        self.channel = channel
        self.lost: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        self.worn = False
        self._admission = admission
        self._solutions = solutions
        self._cause = cause
        """Who knows why the service ended: None where nobody does, and its answer where it has not."""
        self._live: set[ServiceSession] = set()
        self._releases: dict[asyncio.Task[None], ServiceSession] = {}
        self._probe: asyncio.Task[None] | None = None
        self._calls = 0
        self._pending = 0

    async def open(self, spec: EpisodeSpec) -> tuple[ServiceSession, Observation]:
        """See `Sandbox.open`. Cancelled: the creation goes on to its end, and what it made is released."""
        await self._admission.slots.acquire()
        session = ServiceSession(self, f"rollout_{uuid4().hex}", spec.step_timeout_s)
        self._live.add(session)
        try:
            session.creating = asyncio.create_task(self._create(session, spec), name=f"create-{session.id}")
            return session, await session.answer("open", session.creating, CREATE_S)
        except BaseException:
            session.close()
            raise

    async def _create(self, session: ServiceSession, spec: EpisodeSpec) -> Observation:
        async with self._admission.creations:
            body = {"env_type": self.info.name, "task_id": spec.task, "params": {"seed": spec.seed, **spec.options}}
            try:
                return opened(await self.call("open", "create", session.id, body, CREATE_S))
            except SandboxRefused as refused:
                if refused.code == ErrorCode.BAD_REQUEST:
                    failure = Failure(FailureKind.UNKNOWN_TASK, "open", refused.failure.message)
                    raise SandboxRefused(failure, code=ErrorCode.UNKNOWN_TASK) from None
                raise

    async def call(self, stage: str, route: str, instance: str, body: Mapping[str, Any], within_s: float) -> Any:
        """One call of an instance, sent until the service takes it. Raises SandboxLost, SandboxRefused, SandboxError.

        Cancelled: it may have run.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + within_s
        while True:
            if self.lost.done():
                raise SandboxLost(self.lost.result(), suspect=False)
            self._calls += 1
            self._pending += 1
            try:
                return (await self.channel.post(route, {**body, "instance_id": instance})).get("data")
            except Busy as busy:
                if busy.after_s is None or loop.time() + busy.after_s >= ends:
                    raise told(busy, stage) from None
                pause = busy.after_s
            except (UsageError, SandboxError) as error:
                raise await self._judged(told(error, stage), sent=not isinstance(error, Unreachable)) from None
            finally:
                self._pending -= 1
            await asyncio.sleep(pause)

    async def _judged(self, error: SandboxError, *, sent: bool) -> SandboxError:
        """A failed call's error. Where the service died over it, the call is a suspect like all that were sent."""
        if error.failure.kind in _DOUBTFUL:
            await asyncio.wait({self.doubt()})
            if self.lost.done():
                return SandboxLost(replace(self.lost.result(), stage=error.failure.stage), suspect=sent)
        return error

    def doubt(self) -> asyncio.Task[None]:
        """A call broke off, or got no answer: see whether the service is still there."""
        if self._probe is None:
            self._probe = asyncio.create_task(self._look(), name=f"look-at-{self.id}")
        return self._probe

    async def _look(self) -> None:
        try:
            if not (self.lost.done() or await self.channel.alive(PROBE_S)):
                message = f"{self.channel.base_url} does not say that it is well any more"
                silent = Failure(FailureKind.SANDBOX_LOST, "call", message)
                self.condemn(await self._cause() or silent if self._cause is not None else silent)
        finally:
            self._probe = None

    async def tasks(self, split: str) -> TaskList:
        """See `Sandbox.tasks`; "" is the split `train`, and where there is none, what the service says by itself."""
        if split:
            return await self._tasks(split)
        try:
            return await self._tasks("train")
        except UnknownName:
            return await self._tasks("")

    async def _tasks(self, split: str) -> TaskList:
        body = {"env_type": self.info.name, "params": {"split": split}}
        try:
            answer = await self.channel.post("get_env_profile", body)
        except (Unavailable, NoRoute):
            raise
        except (UsageError, SandboxError) as error:
            if isinstance(error, SandboxError) and error.failure.kind is not FailureKind.ENVIRONMENT:
                raise
            known = "a service of AgentScope's has train and val"
            raise UnknownName(f"the service has no split {split!r} ({known}): {error}") from None
        ids = answer.get("data")
        if not isinstance(ids, list) or not all(isinstance(task, str) for task in ids):
            raise malformed("tasks", ids)
        return TaskList(ids)

    async def solution(self, task: str) -> Sequence[bytes]:
        """See `Sandbox.solution`: a service has none to give, this machine's own environment may."""
        if self._solutions is None:
            failure = Failure(FailureKind.ENVIRONMENT, "call", "the backend was not configured for solutions")
            raise SandboxRefused(failure, code=ErrorCode.FORBIDDEN)
        return await self._solutions(task)

    def toolsets(self) -> Mapping[str, bytes]:
        """See `Sandbox.toolsets`: a service writes its tools as text."""
        return {}

    def overdue(self, now: float) -> Failure | None:
        """See `Sandbox.overdue`: every request has a deadline of its own."""
        return None

    def condemn(self, failure: Failure) -> None:
        """See `Sandbox.condemn`."""
        if not self.lost.done():
            self.lost.set_result(failure)
            for session in self._live:
                session.abandon(failure)

    def statistics(self) -> SandboxStatistics:
        """See `Sandbox.statistics`; every call is a frame of its own."""
        return SandboxStatistics(len(self._live), self._pending, self._calls, self._calls, 0)

    def forget(self, session: ServiceSession) -> None:
        """Release a session's instance in the background; called by the session, once."""
        self._live.discard(session)
        task = asyncio.create_task(self._release(session), name=f"release-{session.id}")
        self._releases[task] = session
        task.add_done_callback(self._forgotten)

    def _forgotten(self, task: asyncio.Task[None]) -> None:
        """Also for a release that was cancelled before it had begun."""
        del self._releases[task]
        self._admission.slots.release()

    async def _release(self, session: ServiceSession) -> None:
        if (creating := session.creating) is not None and not creating.done():
            await asyncio.wait({creating})  # a release that overtook its creation would leave the instance
        for attempt in range(_RELEASES):
            if await self._released(session.id, attempt):
                return
            await asyncio.sleep(_RELEASE_PAUSE_S)
        log.error("instance %s is left to the service's own idle clean-up", session.id)

    async def _released(self, instance: str, attempt: int) -> bool:
        try:
            async with asyncio.timeout(RELEASE_S):
                await self.channel.post("release", {"instance_id": instance})
        except (UsageError, SandboxError, TimeoutError) as error:
            log.warning("instance %s could not be released (try %d): %s", instance, attempt + 1, error)
            return False
        return True

    async def drain(self) -> None:
        """Release every instance and wait until that is done."""
        for session in list(self._live):
            session.close()
        while self._releases:
            await asyncio.wait(set(self._releases))
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait({self._probe})

    async def bury(self, failure: Failure) -> None:
        """The service is ended with all its instances: nothing is asked of it any more."""
        self.condemn(failure)
        for session in list(self._live):
            session.close()
        for release, session in self._releases.items():
            release.cancel()
            if session.creating is not None:
                session.creating.cancel()
        await self.drain()

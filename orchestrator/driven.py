"""An episode that is driven from outside, call by call: somebody else decides the actions and when to ask for a grade.

Owns one episode's record and, while it is awake, its session and the lease under it. Always true: calls run one at a
time; an answered step is recorded and an unanswered one is not; a session that is not exactly at the end of the record
(lost, given up in the middle of a call, refused in one) is closed, and the next call begins with a new one, to which
the record is replayed and compared byte for byte; a lease is held exactly as long as a session.

Blame is as in `orchestrator.episode`: the call that was unanswered when its sandbox died is tried alone, and two deaths
there are proof. Then that call fails; the episode stands where it stood before it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeVar

from orchestrator.episode import MAX_LOSSES, PROOFS
from orchestrator.errors import ActionKilled, SandboxError, SandboxLost, SandboxRefused, UsageError
from orchestrator.records import EpisodeBuffer, header
from orchestrator.types import Decision, Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from orchestrator.protocols import Sandbox, Session
    from orchestrator.tenancy import Lease
    from orchestrator.types import EnvironmentInfo, EpisodeSpec, Evaluation, Observation

T = TypeVar("T")
_OPENING: Final = "open"


class Leases(Protocol):
    """What an episode needs of a `Pool`."""

    async def lease(self, *, opens: bool = True) -> Lease:
        """See `Pool.lease`."""
        ...

    def quarantine(self) -> AbstractAsyncContextManager[Sandbox]:
        """See `Pool.quarantine`."""
        ...


class DrivenEpisode:
    """See the module's docstring. Make one with `open`; `close` it in the end."""

    __slots__ = ("_buffer", "_closed", "_info", "_lease", "_lock", "_pool", "_session", "_toolsets", "first", "spec")

    def __init__(self, pool: Leases, spec: EpisodeSpec) -> None:
        self.spec = spec
        self.first: Observation | None = None
        """The opening observation."""
        self._pool = pool
        self._buffer = EpisodeBuffer(header("", ""))
        self._info: EnvironmentInfo | None = None
        self._toolsets: Mapping[str, bytes] = {}
        self._lease: Lease | None = None
        self._session: Session | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, pool: Leases, spec: EpisodeSpec) -> Self:
        """Open an episode. Raises SandboxError (SandboxRefused: the environment does not have the task), RunFailed.

        Cancelled: nothing is held.
        """
        self = cls(pool, spec)
        await self._survive(_OPENING, _nothing)
        return self

    @property
    def turns(self) -> int:
        """Answered actions."""
        return self._buffer.turn

    @property
    def size(self) -> int:
        """Bytes of its record, which is kept for as long as it lives."""
        return len(self._buffer.data)

    @property
    def done(self) -> bool:
        """Whether the environment has said done."""
        return self._buffer.last is not None and self._buffer.last.done

    @property
    def awake(self) -> bool:
        """Whether it has a session in a sandbox now."""
        return self._session is not None

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._lock.locked()

    def toolset(self, digest: str) -> bytes:
        """A tool set that an observation of this episode names: a JSON array. Raises LookupError."""
        return self._toolsets[digest]

    async def step(self, action: bytes) -> Observation:
        """Run one action (JSON of an OpenAI assistant message).

        Raises UsageError when the episode is over, SandboxError (ActionKilled: it ends every sandbox it is tried in),
        RunFailed. Cancelled, or when it raises: the episode stands where it stood before.
        """
        async with self._lock:
            self._refuse_if_over()
            observation = await self._survive("step", lambda session: session.step(action))
            self._buffer.decide(Decision(action))
            self._buffer.observe(observation)
            return observation

    async def evaluate(self, params: Mapping[str, object] | None = None) -> Evaluation:
        """Grade it as it stands. Raises UsageError once it is closed, SandboxError, RunFailed."""
        async with self._lock:
            self._refuse_if_closed()
            return await self._survive("evaluate", lambda session: session.evaluate(params))

    async def sleep(self) -> bool:
        """Give its session back until the next call, where the record can rebuild it; whether it sleeps now."""
        async with self._lock:
            if self._session is not None and self._info is not None and self._info.deterministic:
                self._drop()
            return self._session is None

    def close(self) -> None:
        """Forget it; a call under way fails. Idempotent."""
        self._closed = True
        self._drop()

    def _refuse_if_over(self) -> None:
        self._refuse_if_closed()
        if self.done:
            raise UsageError("the episode is over: evaluate or release it, and create another one to go on")
        if self._info is not None and self.turns >= self._info.max_turns:
            raise UsageError(f"the episode has had its {self.turns} actions: evaluate or release it")

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("the episode was released: create another one")

    async def _survive(self, stage: str, call: Callable[[Session], Awaitable[T]]) -> T:
        """Make a call in a session that stands at the end of the record, through lost sandboxes."""
        losses = deaths = 0
        suspected = False
        while True:
            try:
                return await (self._alone(stage, call) if suspected else self._call(stage, call))
            except SandboxRefused:
                self._refuse_if_closed()  # the session was closed under the call
                raise
            except SandboxLost as lost:
                self._refuse_if_closed()
                losses += 1
                deaths += suspected and lost.suspect
                suspected = suspected or (lost.suspect and lost.failure.stage == stage)
                if deaths >= PROOFS:
                    failure = lost.failure
                    message = f"this call ended its sandbox, {PROOFS} times alone: {failure.message}"
                    raise ActionKilled(Failure(failure.kind, stage, message)) from lost
                self._refuse_to_rebuild(lost, losses)

    def _refuse_to_rebuild(self, lost: SandboxLost, losses: int) -> None:
        if losses > MAX_LOSSES:
            raise SandboxError(lost.failure) from lost
        if self._info is not None and not self._info.deterministic:
            message = f"the sandbox was lost ({lost.failure.message}) and the environment cannot be replayed"
            raise SandboxError(Failure(FailureKind.NOT_DETERMINISTIC, lost.failure.stage, message)) from lost

    async def _call(self, stage: str, call: Callable[[Session], Awaitable[T]]) -> T:
        """The call in this episode's own session, which is rebuilt where there is none."""
        try:
            session = self._session or await self._wake()
            return await call(session)
        except SandboxRefused:
            if stage != "evaluate" or self._session is None:  # what a refused step has changed is unknown
                self._drop()
            raise
        except BaseException:  # cancellation included: how far the call came is unknown
            self._drop()
            raise

    async def _wake(self) -> Session:
        self._lease = await self._pool.lease()
        session = await self._rebuilt(self._lease.sandbox)
        self._session = session
        self._refuse_if_closed()  # meanwhile
        return session

    async def _alone(self, stage: str, call: Callable[[Session], Awaitable[T]]) -> T:
        """The call in a sandbox with nobody else on it; its session ends with it."""
        async with self._pool.quarantine() as sandbox:
            session = await self._rebuilt(sandbox)
            try:
                return await call(session)
            finally:
                session.close()

    async def _rebuilt(self, sandbox: Sandbox) -> Session:
        """A session that stands where the record ends. What is replayed is no suspect: it was answered before."""
        if self._buffer.last is not None:
            try:
                return await self._replayed(sandbox)
            except SandboxLost as lost:
                raise SandboxLost(lost.failure, suspect=False) from lost
        session, observation = await sandbox.open(self.spec)
        self._buffer.observe(observation)
        self.first, self._info, self._toolsets = observation, sandbox.info, sandbox.toolsets()
        return session

    async def _replayed(self, sandbox: Sandbox) -> Session:
        session, observation = await sandbox.open(self.spec)
        try:
            recorded, actions = self._buffer.history()
            _compare(recorded, [observation, *await session.replay(actions)])
        except BaseException:
            session.close()
            raise
        self._toolsets = sandbox.toolsets()
        return session

    def _drop(self) -> None:
        session, self._session = self._session, None
        lease, self._lease = self._lease, None
        if session is not None:
            session.close()
        if lease is not None:
            lease.release()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "done" if self.done else "awake" if self.awake else "asleep"
        return f"<DrivenEpisode {self.spec.task} {state} turns={self.turns}>"


async def _nothing(session: Session) -> None:
    """Opening is all that was asked for."""


def _compare(recorded: list[Observation], replayed: list[Observation]) -> None:
    for number, (old, new) in enumerate(zip(recorded, replayed, strict=True)):
        if old != new:
            message = f"replayed observation {number} differs: {new.body[:80]!r}, recorded {old.body[:80]!r}"
            raise SandboxError(Failure(FailureKind.DIVERGED, "replay", message))

"""All that the engine asks of the outside. Each protocol has a conformance kit in `orchestrator.testing`.

Units are seconds and bytes. Every coroutine may be cancelled at any await; what that leaves behind is said per method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from orchestrator.records import ConversationView
    from orchestrator.types import (
        Decision,
        EnvironmentInfo,
        EpisodeKey,
        EpisodeSpec,
        Evaluation,
        Failure,
        Group,
        Observation,
        RunId,
        SandboxId,
        TaskList,
    )


@dataclass(frozen=True, slots=True)
class EpisodeContext:
    """What a policy knows of an episode before its first observation."""

    key: EpisodeKey
    attempt: int
    seed: int
    """The policy's seed: f(run seed, task, group, sample). Random choices must follow from (seed, turn) alone."""
    solution: Callable[[], Awaitable[Sequence[bytes]]] | None
    """The task's known solution as a list of actions; None unless the policy asked for solutions."""


@runtime_checkable
class Agent(Protocol):
    """Acts in one attempt of one episode. Its state follows from (context, view) alone: that makes resume possible."""

    async def act(self, view: ConversationView) -> Decision:
        """Decide the next action. May raise anything: it becomes a failure of kind `policy`, or PolicyError's own.

        Cancelled when the episode's time budget ends or the run is cancelled; must not swallow it.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """Makes agents. An async context manager may be implemented too; then the engine enters and leaves it."""

    name: str
    needs_solutions: bool
    """Whether sandboxes must be started with `--with-solutions`. Only the replay policy says True."""
    calls_model: bool
    """Whether decisions are costly: makes step durability the default."""

    def start(self, ctx: EpisodeContext) -> Agent:
        """A fresh agent; also called for an attempt that resumes in the middle."""
        ...


class Session(Protocol):
    """One episode's incarnation in one sandbox. Calls are made one at a time by one owner."""

    async def step(self, action: bytes) -> Observation:
        """Run one action. Raises SandboxLost, SandboxRefused. Cancelled: the step's outcome is unknown."""
        ...

    async def replay(self, actions: Sequence[bytes]) -> list[Observation]:
        """Run recorded actions in order, pipelined. Raises as `step`. Used only while recovering."""
        ...

    async def evaluate(self, params: Mapping[str, object] | None = None) -> Evaluation:
        """Grade the session as it stands; idempotent, allowed mid-episode. Raises as `step`."""
        ...

    def close(self) -> None:
        """Forget the session on both sides, without waiting. Idempotent; after a loss it does nothing."""
        ...


class Sandbox(Protocol):
    """A process, container or actor that serves sessions of one environment."""

    id: SandboxId
    info: EnvironmentInfo
    lost: asyncio.Future[Failure]
    """Done once, when the sandbox is gone, with why; idle episodes learn of a death through it."""
    worn: bool
    """Whether it should be replaced when nobody holds it any more; said by its backend (of its memory, say)."""

    async def open(self, spec: EpisodeSpec) -> tuple[Session, Observation]:
        """Open a session. Raises SandboxLost, SandboxRefused. Cancelled: the session is closed on arrival."""
        ...

    async def tasks(self, split: str) -> TaskList:
        """The tasks of a split. Raises UnknownName, Unavailable, SandboxLost."""
        ...

    async def solution(self, task: str) -> Sequence[bytes]:
        """The known solution of a task, as actions. Raises SandboxRefused (`forbidden`) without `--with-solutions`."""
        ...

    def toolsets(self) -> Mapping[str, bytes]:
        """Tool sets received so far by digest, each a JSON array. Verified against the digest."""
        ...

    def overdue(self, now: float) -> Failure | None:
        """Why this sandbox has passed its deadline at monotonic `now`, or None. Cheap: called a few times a second."""
        ...

    def condemn(self, failure: Failure) -> None:
        """Declare the sandbox lost at once: `lost` is done and every waiting call raises. Idempotent; kills nothing."""
        ...

    def statistics(self) -> SandboxStatistics:
        """Counts of this sandbox; cheap."""
        ...


@dataclass(frozen=True, slots=True)
class SandboxStatistics:
    """What a sandbox has done; `pid` is 0 where there is no local process."""

    sessions: int
    pending: int
    calls: int
    frames: int
    pid: int


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one sandbox is good for; None is no limit. Where code of the agent's runs: one session, one episode."""

    sessions: int | None = None
    """Sessions at once."""
    episodes: int | None = None
    """Sessions in all, before it is replaced."""


class Backend(Protocol):
    """Creates and destroys sandboxes. An async context manager; entering it makes its listener ready."""

    environment: str
    limits: SandboxLimits

    async def __aenter__(self) -> Backend: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """Called once before entering.

        `run` is the owner label; `logs` a folder for the sandboxes' own output; `call_limit_s` is how long a sandbox
        with unanswered calls may make no progress before it counts as hung.
        """
        ...

    async def create(self) -> Sandbox:
        """Start a sandbox and wait until it answers. Raises SandboxError. Cancelled: what was started is destroyed."""
        ...

    async def destroy(self, sandbox: SandboxId) -> None:
        """End a sandbox and wait until it is gone. Idempotent: already gone is success."""
        ...

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """The live sandboxes of a run, by label."""
        ...

    def cpu_seconds(self) -> float:
        """User + system CPU of all sandboxes so far, dead ones included, descendants included."""
        ...


class TrainerQueue(Protocol):
    """Where finished groups go. A queue is a consumer of the run's outbox, under its own name."""

    name: str

    async def deliver(self, group: Group) -> None:
        """Accept a group: idempotent by its keys. Returning = accepted; waiting = backpressure.

        Raising = refused, which ends the run with RunFailed (the group stays in the outbox for the resume).

        Cancelled: the group counts as not accepted and is delivered again.
        """
        ...


@runtime_checkable
class LendingQueue(TrainerQueue, Protocol):
    """A queue whose groups workers acknowledge: a group stays in the outbox until one has, whatever dies before that.

    `deliver` returning means that a group was taken in; it is not waited for its acknowledgement.
    """

    async def acked(self) -> Sequence[int]:
        """The numbers of groups that were acknowledged since the last call, or wait for some. Each is named once.

        Raising ends the run with RunFailed. Cancelled: those are named by the next call.
        """
        ...

    async def finish(self) -> None:
        """The run is complete and every acknowledgement is durable: workers may go. Idempotent."""
        ...

"""A backend without processes: sandboxes in memory that answer in a few turns of the loop and fail exactly as told.

For tests of what stands above a backend, in virtual time where wanted. Its environment is deterministic: an
observation names the task, the seed and a digest of all actions so far; an action that says `stop` ends the episode;
the grade is the number of actions answered. A script sees every call before it runs and may return a fault.

Always true: a lost sandbox answers nothing more, and every call that waits at the loss raises SandboxLost as a suspect;
`statistics()` counts what is alive, so that a test can see that nothing was left behind.
"""

from __future__ import annotations

import asyncio
import sys
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import orjson

from orchestrator.errors import SandboxError, SandboxLost, SandboxRefused, UnknownName
from orchestrator.protocols import SandboxLimits, SandboxStatistics
from orchestrator.testing.script import Die, Fault, Gone, Hang, MemoryCall, Refuse, Say, Script, Slow
from orchestrator.types import (
    EnvironmentInfo,
    Evaluation,
    Failure,
    FailureKind,
    Observation,
    RunId,
    SandboxId,
    TaskList,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.types import EpisodeSpec

TASKS: Final = 64
START_S: Final = 60.0
"""A sandbox for which there has been no room this long is not started."""


class MemoryStatistics(NamedTuple):
    """Sandboxes and sessions alive now; sandboxes started, and calls made, so far."""

    sandboxes: int
    sessions: int
    started: int
    calls: int


class MemoryBackend:
    """See the module's docstring. `script` decides each call's fault; None answers truthfully.

    There is `room` for so many sandboxes; those that are created beyond wait until one is destroyed, in their order.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        deterministic: bool = True,
        max_turns: int = 64,
        limits: SandboxLimits | None = None,
        room: int = sys.maxsize,
    ) -> None:
        self.environment = "memory"
        self.limits = limits or SandboxLimits()
        self.info = EnvironmentInfo("memory", "0" * 16, "shared", deterministic, False, max_turns)
        self.live: dict[SandboxId, MemorySandbox] = {}
        self.with_solutions = False
        self.call_limit_s = 60.0
        self._script = script
        self._room = asyncio.Semaphore(room)
        self._run = RunId("")
        self._started = 0
        self._calls = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for sandbox in list(self.live):
            self._end(sandbox)

    def configure(self, *, run: RunId, with_solutions: bool, logs: str | None, call_limit_s: float) -> None:
        """See `Backend.configure`."""
        self._run = run
        self.with_solutions = with_solutions
        self.call_limit_s = call_limit_s

    async def create(self) -> MemorySandbox:
        """See `Backend.create`."""
        self._started += 1
        number = self._started
        try:
            async with asyncio.timeout(START_S):
                await self._room.acquire()
        except TimeoutError:
            raise SandboxError(Failure(FailureKind.SANDBOX_START, "start", "there is no room")) from None
        try:
            await self._pause(self.ask(MemoryCall(number, "create")), FailureKind.SANDBOX_START)
        except BaseException:
            self._room.release()
            raise
        sandbox = MemorySandbox(self, number)
        self.live[sandbox.id] = sandbox
        return sandbox

    async def destroy(self, sandbox: SandboxId) -> None:
        """See `Backend.destroy`."""
        if sandbox in self.live:
            await self._pause(self.ask(MemoryCall(self.live[sandbox].number, "destroy")), FailureKind.SANDBOX_LOST)
            self._end(sandbox)

    async def owned_by(self, run: RunId) -> Sequence[SandboxId]:
        """See `Backend.owned_by`."""
        return list(self.live) if run == self._run else []

    def cpu_seconds(self) -> float:
        """None is used."""
        return 0.0

    def ask(self, call: MemoryCall) -> Fault | None:
        """What the script says to a call."""
        self._calls += 1
        return None if self._script is None else self._script(call)

    def statistics(self) -> MemoryStatistics:
        """Counts; cheap."""
        sessions = sum(sandbox.statistics().sessions for sandbox in self.live.values())
        return MemoryStatistics(len(self.live), sessions, self._started, self._calls)

    async def _pause(self, fault: Fault | None, kind: FailureKind) -> None:
        match fault:
            case Die(_, message):
                raise SandboxError(Failure(kind, "start", message))
            case Hang():
                await asyncio.get_running_loop().create_future()
            case Slow(seconds):
                await asyncio.sleep(seconds)
            case _:
                await asyncio.sleep(0)

    def _end(self, sandbox: SandboxId) -> None:
        ended = self.live.pop(sandbox, None)
        if ended is not None:
            self._room.release()
            ended.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "the sandbox was destroyed"))


class MemorySandbox:
    """A sandbox in memory. Satisfies `orchestrator.protocols.Sandbox`."""

    def __init__(self, backend: MemoryBackend, number: int) -> None:
        self.id = SandboxId(f"memory-{number}")
        self.info = backend.info
        self.number = number
        self.lost: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        self.sessions = 0
        self.worn = False
        self._backend = backend
        self._waiting: dict[int, float] = {}
        self._calls = 0

    async def open(self, spec: EpisodeSpec) -> tuple[MemorySession, Observation]:
        """See `Sandbox.open`."""
        session = MemorySession(self, spec)
        try:
            said = await self.call("open", spec.task)
            if not _known(spec.task):
                failure = Failure(FailureKind.UNKNOWN_TASK, "open", f"unknown task {spec.task!r}")
                raise SandboxRefused(failure, code="unknown_task")
        except BaseException:
            session.close()
            raise
        return session, session.observation() if said is None else Observation(said.body)

    async def tasks(self, split: str) -> TaskList:
        """`memory_0` to `memory_63`, for the split `memory` or the default one."""
        await self.call("tasks")
        if split not in {"", "memory"}:
            raise UnknownName(f"unknown split {split!r}; known: memory")
        return TaskList([f"memory_{number}" for number in range(TASKS)])

    async def solution(self, task: str) -> Sequence[bytes]:
        """Three actions and `stop`."""
        await self.call("solution", task)
        if not self._backend.with_solutions:
            failure = Failure(FailureKind.PROTOCOL, "solution", "this backend was not configured with solutions")
            raise SandboxRefused(failure, code="forbidden")
        words = ("one", "two", "three", "stop")
        return [orjson.dumps({"role": "assistant", "content": word}) for word in words]

    async def call(self, op: str, task: str = "", turn: int = 0, action: bytes = b"") -> Say | None:
        """Wait as the script says. Raises SandboxLost, SandboxRefused."""
        fault = None if self.lost.done() else self._backend.ask(MemoryCall(self.number, op, task, turn, action))
        if isinstance(fault, Gone):
            self.condemn(Failure(FailureKind.SANDBOX_LOST, "call", "it was gone as scripted"))
        if self.lost.done():
            raise SandboxLost(self.lost.result(), suspect=False)
        self._calls += 1
        number = self._calls
        self._waiting[number] = asyncio.get_running_loop().time()
        try:
            if isinstance(fault, Die):
                self.condemn(Failure(fault.kind, "call", fault.message))
            await self._answered(op, fault)
        finally:
            del self._waiting[number]
        if isinstance(fault, Refuse):
            failure = Failure(fault.kind, op, "refused as scripted")
            raise SandboxRefused(failure, code=fault.code)
        return fault if isinstance(fault, Say) else None

    async def _answered(self, op: str, fault: Fault | None) -> None:
        match fault:
            case Hang():
                await asyncio.wait({self.lost})
            case Slow(seconds):
                await asyncio.wait({self.lost}, timeout=seconds)
            case _:
                await asyncio.sleep(0)
        if self.lost.done():
            failure = self.lost.result()
            raise SandboxLost(Failure(failure.kind, op, failure.message), suspect=True)

    def toolsets(self) -> Mapping[str, bytes]:
        """None."""
        return {}

    def overdue(self, now: float) -> Failure | None:
        """See `Sandbox.overdue`."""
        oldest = min(self._waiting.values(), default=now)
        if now - oldest <= self._backend.call_limit_s:
            return None
        return Failure(FailureKind.SANDBOX_HUNG, "call", f"no answer for {now - oldest:.1f} s")

    def condemn(self, failure: Failure) -> None:
        """See `Sandbox.condemn`."""
        if not self.lost.done():
            self.lost.set_result(failure)

    def statistics(self) -> SandboxStatistics:
        """See `Sandbox.statistics`."""
        return SandboxStatistics(self.sessions, len(self._waiting), self._calls, self._calls, 0)

    def __repr__(self) -> str:
        return f"<MemorySandbox {self.id} {self.statistics()}>"


class MemorySession:
    """A session in memory. Satisfies `orchestrator.protocols.Session`."""

    def __init__(self, sandbox: MemorySandbox, spec: EpisodeSpec) -> None:
        self._sandbox = sandbox
        self._spec = spec
        self._actions: list[bytes] = []
        self._closed = False
        sandbox.sessions += 1

    def observation(self) -> Observation:
        """What follows from the task, the seed and the actions so far."""
        digest = blake2b(b"\0".join(self._actions), digest_size=8).hexdigest()
        text = f"{self._spec.task} seed {self._spec.seed} turn {len(self._actions)} {digest}"
        done = bool(self._actions) and b"stop" in self._actions[-1]
        return Observation(orjson.dumps({"messages": [{"role": "user", "content": text}]}), 0.0, done)

    async def step(self, action: bytes) -> Observation:
        """See `Session.step`."""
        said = await self._call("step", action)
        self._actions.append(action)
        return self.observation() if said is None else Observation(said.body)

    async def replay(self, actions: Sequence[bytes]) -> list[Observation]:
        """See `Session.replay`."""
        return [await self.step(action) for action in actions]

    async def evaluate(self, params: Mapping[str, object] | None = None) -> Evaluation:
        """The number of actions answered."""
        said = await self._call("evaluate", b"")
        return Evaluation(float(len(self._actions)) if said is None else said.grade)

    def close(self) -> None:
        """See `Session.close`."""
        if not self._closed:
            self._closed = True
            self._sandbox.sessions -= 1

    async def _call(self, op: str, action: bytes) -> Say | None:
        if self._closed:
            failure = Failure(FailureKind.PROTOCOL, op, "the session was released; open a new one")
            raise SandboxRefused(failure, code="unknown_session")
        return await self._sandbox.call(op, self._spec.task, len(self._actions), action)


def _known(task: str) -> bool:
    prefix, _, number = task.rpartition("_")
    return prefix == "memory" and number.isdecimal() and int(number) < TASKS

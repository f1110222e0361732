"""What the conformance kits share: a deadline and a look for leaks around each check, and words for promises.

A check is an async function of `make_backend`, which gives a fresh backend, not entered. It raises ConformanceError
with the promise that is broken. Nothing here needs a test framework.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar
from uuid import uuid4

import orjson

from orchestrator.errors import ConformanceError, RolloutError, SandboxError, SandboxLost, SandboxRefused
from orchestrator.testing.leaks import look, settled
from orchestrator.types import EpisodeSpec, Failure, RunId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from orchestrator.protocols import Backend, Sandbox, Session
    from orchestrator.types import Observation

    MakeBackend: TypeAlias = Callable[[], Backend]
    Check: TypeAlias = Callable[[MakeBackend], Awaitable[None]]

T = TypeVar("T")

RUN: Final = RunId(f"kit-{uuid4().hex[:8]}")
"""A label of this process's own: backends end what carries a run's label and is nobody's."""
LIMIT_S: Final = 60.0
"""How long a single check may take."""
NOTICE_S: Final = 5.0
"""Within this a death must be noticed."""
CALL_LIMIT_S: Final = 2.0
"""How long a sandbox under test may make no progress."""


async def run_check(check: Check, make_backend: MakeBackend, *, sockets: bool = True, limit_s: float = LIMIT_S) -> None:
    """Run one check, for at most `limit_s` seconds, and see that it leaves nothing behind. Raises ConformanceError.

    `sockets`: whether open ones count; False for a backend whose client library keeps its own.
    """
    await asyncio.to_thread(int)  # the loop's own threads and files are there before the first look
    before = await look()
    try:
        async with asyncio.timeout(limit_s):
            await check(make_backend)
    except TimeoutError as error:
        raise ConformanceError(f"a check did not end within {limit_s:g} s") from error
    except ConformanceError:
        raise
    except (RolloutError, ExceptionGroup) as error:
        raise ConformanceError(f"a call failed that must not fail: {error!r}") from error
    await settled(before, sockets=sockets)


@asynccontextmanager
async def entered(make_backend: MakeBackend, *, with_solutions: bool = False) -> AsyncIterator[Backend]:
    """A backend, configured and entered; after it no sandbox of the run may be alive."""
    backend = make_backend()
    backend.configure(run=RUN, with_solutions=with_solutions, logs=None, call_limit_s=CALL_LIMIT_S)
    async with backend:
        yield backend
    require(not await backend.owned_by(RUN), "leaving a backend destroys its sandboxes")


@asynccontextmanager
async def one_sandbox(make_backend: MakeBackend) -> AsyncIterator[tuple[Backend, Sandbox, str]]:
    """An entered backend, a sandbox of it, and the name of a task."""
    async with entered(make_backend) as backend:
        sandbox = await backend.create()
        yield backend, sandbox, (await sandbox.tasks("")).ids[0]


def require(holds: bool, promise: str) -> None:
    """Raise ConformanceError unless the promise holds."""
    if not holds:
        raise ConformanceError(promise)


def say(content: str) -> bytes:
    """An assistant message."""
    return orjson.dumps({"role": "assistant", "content": content})


def spec(task: str, *, seed: int = 7, step_timeout_s: float = 30.0) -> EpisodeSpec:
    """How to open a task."""
    return EpisodeSpec(task, seed, step_timeout_s)


async def until_lost(sandbox: Sandbox, within_s: float = NOTICE_S) -> Failure:
    """Keep deadlines, as the engine does, until the sandbox is lost. Raises ConformanceError when it is too late."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + within_s
    while not sandbox.lost.done():
        require(loop.time() < ends, f"a death is noticed within {within_s:g} s")
        if (failure := sandbox.overdue(loop.time())) is not None:
            sandbox.condemn(failure)
        await asyncio.sleep(0.02)
    return sandbox.lost.result()


async def refused(call: Awaitable[object], what: str) -> SandboxRefused:
    """The refusal that a call must end with."""
    try:
        await call
    except SandboxRefused as error:
        return error
    except SandboxError as error:
        raise ConformanceError(f"{what} must be refused, not {error!r}") from error
    raise ConformanceError(f"{what} must be refused; it was answered")


async def loses(call: Awaitable[object], what: str) -> SandboxLost:
    """The loss that a call must end with."""
    try:
        await call
    except SandboxLost as error:
        return error
    raise ConformanceError(f"{what} must raise SandboxLost; it was answered")


MESSAGES: Final = tuple(say(f"message {n}") for n in range(6))


async def play(sandbox: Sandbox, task: str, *, seed: int) -> list[Observation]:
    session, first = await sandbox.open(spec(task, seed=seed))
    seen = [first, *await steps(session, MESSAGES)]
    session.close()
    return seen


async def steps(session: Session, actions: Sequence[bytes]) -> list[Observation]:
    """Step until the actions are used up or the episode is done."""
    seen: list[Observation] = []
    for action in actions:
        seen.append(await session.step(action))
        if seen[-1].done:
            break
    return seen


async def cancel_after(call: Coroutine[object, object, T], turns: int) -> T | None:
    """Begin a call and cancel it after some turns of the loop; its result, where it was quicker."""
    task = asyncio.create_task(call, name="to-be-cancelled")
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return None if task.cancelled() else task.result()

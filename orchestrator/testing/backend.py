"""The conformance kit of backends: what `Backend`, `Sandbox` and `Session` promise, tried out on a real one.

    async def test_my_backend():
        await check_backend(lambda: MyBackend("toy"), faults=True)

`make_backend()` gives a fresh backend, not entered. The checks need an environment that answers any assistant message;
with `faults=True` those of `orchestrator.testing.faults` run too, which need the environment `toy`. Each check enters a
backend of its own, and leaves nothing behind: no sandbox, task, open file or child process.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from orchestrator.errors import ConformanceError, UnknownName
from orchestrator.testing.faults import FAULT_CHECKS
from orchestrator.testing.harness import (
    MESSAGES,
    RUN,
    cancel_after,
    entered,
    loses,
    one_sandbox,
    play,
    refused,
    require,
    run_check,
    say,
    spec,
    steps,
)
from orchestrator.types import Failure, FailureKind, RunId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.testing.harness import Check, MakeBackend


async def check_backend(make_backend: MakeBackend, *, faults: bool = False) -> None:
    """Check a backend against its contract. Raises ConformanceError with the first promise that it breaks."""
    for check in {**BACKEND_CHECKS, **(FAULT_CHECKS if faults else {})}.values():
        await run_check(check, make_backend)


async def _life(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (backend, sandbox, task):
        require(sandbox.info.name == backend.environment, "a sandbox serves its backend's environment")
        require(list(await backend.owned_by(RUN)) == [sandbox.id], "a live sandbox is found by its run's label")
        require(not await backend.owned_by(RunId("another")), "a label finds the sandboxes of its run alone")
        require(not sandbox.lost.done(), "a fresh sandbox is not lost")
        session, _ = await sandbox.open(spec(task))
        await backend.destroy(sandbox.id)
        require(sandbox.lost.done(), "a destroyed sandbox is lost")
        lost = await loses(session.step(say("x")), "a step after the sandbox's end")
        require(not lost.suspect, "a call made after a death is no suspect")
        require(not await backend.owned_by(RUN), "a destroyed sandbox is gone when destroy returns")
        await backend.destroy(sandbox.id)
        second = await backend.create()
        require(second.id != sandbox.id, "ids of sandboxes are never used again")
        require(backend.cpu_seconds() >= 0.0, "CPU time is a number of seconds")


async def _interleave(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        alone = await play(sandbox, task, seed=3)
        async with asyncio.TaskGroup() as tasks:
            plays = [tasks.create_task(play(sandbox, task, seed=3 + n % 2)) for n in range(32)]
        require(
            all(play.result() == alone for play in plays[::2]), "sessions side by side see what they would see alone"
        )


async def _order(make_backend: MakeBackend) -> None:
    actions = [say(f"step {n}") for n in range(50)]
    async with one_sandbox(make_backend) as (_, sandbox, task):
        session, _ = await sandbox.open(spec(task))
        one_by_one = await steps(session, actions)
        again, _ = await sandbox.open(spec(task))
        together = await again.replay(actions[: len(one_by_one)])
        require(together == one_by_one, "a replay runs its actions in order, and each once")


async def _release(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        session, _ = await sandbox.open(spec(task))
        require(sandbox.statistics().sessions == 1, "an open session is counted")
        session.close()
        session.close()
        require(sandbox.statistics().sessions == 0, "a closed session is not counted")
        for call, what in ((session.step(say("x")), "a step"), (session.evaluate(), "an evaluate")):
            error = await refused(call, f"{what} after the release")
            require(error.code == "unknown_session", f"{what} after the release says that the session is not open")
        other, _ = await sandbox.open(spec(task))
        await other.step(say("x"))


async def _evaluate(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        plain = await play(sandbox, task, seed=1)
        session, first = await sandbox.open(spec(task, seed=1))
        seen = [first]
        for action in MESSAGES[: len(plain) - 1]:
            grade = await session.evaluate()
            require(grade == await session.evaluate(), "evaluate is idempotent")
            seen.append(await session.step(action))
        require(seen == plain, "evaluate changes nothing")


async def _unknown(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        error = await refused(sandbox.open(spec("no such task")), "an unknown task")
        require(error.failure.kind is FailureKind.UNKNOWN_TASK, "an unknown task is named so")
        require(sandbox.statistics().sessions == 0, "a session that did not open is not counted")
        try:
            await sandbox.tasks("no such split")
        except UnknownName:
            pass
        else:
            raise ConformanceError("an unknown split raises UnknownName")
        await sandbox.open(spec(task))


async def _solutions(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        error = await refused(sandbox.solution(task), "a solution, unless the backend was configured for it")
        require(error.code == "forbidden", "a solution is forbidden, not missing")
    async with entered(make_backend, with_solutions=True) as backend:
        sandbox = await backend.create()
        solution = await sandbox.solution(task)
        require(bool(solution) and all(type(action) is bytes for action in solution), "a solution is a list of actions")


async def _cancelled_create(make_backend: MakeBackend) -> None:
    async with entered(make_backend) as backend:
        for turns in range(12):
            if (made := await cancel_after(backend.create(), turns)) is not None:
                await backend.destroy(made.id)
            require(not await backend.owned_by(RUN), "a cancelled create leaves no sandbox behind")
        for delay in (0.005, 0.02, 0.05, 0.1):
            creating = asyncio.create_task(backend.create(), name="create-to-be-cancelled")
            await asyncio.wait({creating}, timeout=delay)
            creating.cancel()
            await asyncio.wait({creating})
            if not creating.cancelled():
                await backend.destroy(creating.result().id)
            require(not await backend.owned_by(RUN), "a create cancelled while it waits leaves no sandbox behind")
        await backend.create()


async def _cancelled_calls(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, task):
        alone = await play(sandbox, task, seed=5)
        for turns in range(8):
            if (opened := await cancel_after(sandbox.open(spec(task)), turns)) is not None:
                opened[0].close()
            session, _ = await sandbox.open(spec(task))
            await cancel_after(session.step(say("x")), turns)
            session.close()
        require(sandbox.statistics().sessions == 0, "a cancelled open leaves no session behind")
        require(await play(sandbox, task, seed=5) == alone, "cancelled calls of others change nothing")


async def _condemned(make_backend: MakeBackend) -> None:
    first, second = (Failure(FailureKind.SANDBOX_HUNG, "call", text) for text in ("condemned", "again"))
    async with one_sandbox(make_backend) as (backend, sandbox, task):
        session, _ = await sandbox.open(spec(task))
        sandbox.condemn(first)
        sandbox.condemn(second)
        require(sandbox.lost.result() == first, "a sandbox is condemned once")
        require(list(await backend.owned_by(RUN)) == [sandbox.id], "condemning kills nothing")
        lost = await loses(session.step(say("x")), "a step on a condemned sandbox")
        require(lost.failure.kind is first.kind, "calls on a condemned sandbox say why it is lost")
        session.close()
        await backend.destroy(sandbox.id)


BACKEND_CHECKS: Final[Mapping[str, Check]] = {
    "life": _life,
    "interleave": _interleave,
    "order": _order,
    "release": _release,
    "evaluate": _evaluate,
    "unknown": _unknown,
    "solutions": _solutions,
    "cancelled_create": _cancelled_create,
    "cancelled_calls": _cancelled_calls,
    "condemned": _condemned,
}
"""The checks that any environment can take, by name."""

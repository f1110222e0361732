"""Checks of a backend under faults, for `check_backend(..., faults=True)`: they need the environment `toy`.

Each says what its sandbox is to do, and demands a truthful report within a bound: which calls are suspects, of what
kind the failure is, and that the other sessions, or the backend's next sandbox, go on.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Final

from orchestrator.testing.harness import NOTICE_S, loses, one_sandbox, play, refused, require, say, spec, until_lost
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.protocols import Sandbox
    from orchestrator.testing.harness import Check, MakeBackend

TASK: Final = "toy_3"
STEP_LIMIT_S: Final = 0.5
_LIMIT: Final = 4 * 1024 * 1024


async def _slow_step(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        slow, _ = await sandbox.open(spec(TASK))
        fast, _ = await sandbox.open(spec(TASK))
        sleeping = asyncio.create_task(slow.step(say("sleep 1")), name="slow-step")
        for _ in range(20):
            await fast.step(say("add 1"))
        require(not sleeping.done(), "a slow step never holds a fast one back")
        await sleeping


async def _own_order(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        session, _ = await sandbox.open(spec(TASK))
        answers = await session.replay([say("sleep 0.1"), say("add 1"), say("add 2")])
        told = [text in answer.body for text, answer in zip((b"slept", b"total 1", b"total 3"), answers, strict=True)]
        require(all(told), "a session's calls wait for each other")


async def _death(make_backend: MakeBackend, content: str, kind: FailureKind, says: str, what: str) -> None:
    """A session's own action ends its sandbox; another one sits idle meanwhile."""
    async with one_sandbox(make_backend) as (backend, sandbox, _task):
        guilty, _ = await sandbox.open(spec(TASK, step_timeout_s=STEP_LIMIT_S))
        idle, _ = await sandbox.open(spec(TASK))
        dying = asyncio.create_task(guilty.step(say(content)), name="dying-step")
        failure = await until_lost(sandbox)
        lost = await loses(dying, what)
        require(lost.suspect, f"{what}: the call in flight is a suspect")
        require(lost.failure.stage == "step", f"{what}: the loss names the stage of the call")
        require(failure.kind is kind, f"{what} is reported as {kind}, not {failure.kind}")
        require(says in failure.message, f"{what}: the failure says {says!r}, not {failure.message!r}")
        require(not (await loses(idle.step(say("x")), what)).suspect, f"{what}: an idle session is no suspect")
        await backend.destroy(sandbox.id)
        await play(await backend.create(), TASK, seed=1)


async def _crash(make_backend: MakeBackend) -> None:
    await _death(make_backend, "crash", FailureKind.SANDBOX_LOST, "code 9", "a crash")


async def _abort(make_backend: MakeBackend) -> None:
    await _death(make_backend, "abort", FailureKind.SANDBOX_LOST, "SIGABRT", "an abort")


async def _hang_in_c(make_backend: MakeBackend) -> None:
    await _death(make_backend, "hang", FailureKind.SANDBOX_HUNG, "limit", "a hang in C code")


async def _spin(make_backend: MakeBackend) -> None:
    await _death(make_backend, "spin", FailureKind.SANDBOX_HUNG, "limit", "a loop in Python code")


async def _overlong_wait(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        slow, _ = await sandbox.open(spec(TASK, step_timeout_s=0.2))
        other, _ = await sandbox.open(spec(TASK))
        lost = await loses(slow.step(say("sleep 30")), "a step that waits beyond its limit")
        require(lost.suspect, "a step beyond its limit is a suspect")
        require(lost.failure.kind is FailureKind.SANDBOX_HUNG, "a step beyond its limit hangs")
        await other.step(say("add 1"))
        require(not sandbox.lost.done(), "a step that merely waits too long does not take its sandbox along")


async def _signalled(make_backend: MakeBackend, number: signal.Signals, kind: FailureKind) -> None:
    async with one_sandbox(make_backend) as (backend, sandbox, _task):
        pid = sandbox.statistics().pid
        if pid == 0:
            return  # no process on this machine to send a signal to
        waiting, _ = await sandbox.open(spec(TASK))
        step = asyncio.create_task(waiting.step(say("sleep 30")), name="waiting-step")
        await _asleep(sandbox)
        os.kill(pid, number)
        failure = await until_lost(sandbox)
        require(failure.kind is kind, f"{number.name} is reported as {kind}, not {failure.kind}: {failure.message}")
        require((await loses(step, number.name)).suspect, f"{number.name}: the call in flight is a suspect")
        await backend.destroy(sandbox.id)
        await play(await backend.create(), TASK, seed=1)


async def _asleep(sandbox: Sandbox) -> None:
    """Until the sandbox has read what was sent: it answers a call that was sent later."""
    session, _ = await sandbox.open(spec(TASK))
    session.close()


async def _kill(make_backend: MakeBackend) -> None:
    await _signalled(make_backend, signal.SIGKILL, FailureKind.SANDBOX_LOST)


async def _stop(make_backend: MakeBackend) -> None:
    await _signalled(make_backend, signal.SIGSTOP, FailureKind.SANDBOX_HUNG)


async def _idle_kill(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        if (pid := sandbox.statistics().pid) == 0:
            return
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(NOTICE_S):
            failure = await asyncio.shield(sandbox.lost)
        require("SIGKILL" in failure.message, f"the death of an idle sandbox is noticed and told: {failure.message}")


async def _oversized(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        session, _ = await sandbox.open(spec(TASK))
        error = await refused(session.step(say(f"big {_LIMIT}")), "an observation over the size cap")
        require(error.code == "too_large", "an observation over the size cap is named so")
        require(len((await session.step(say(f"big {_LIMIT // 2}"))).body) > _LIMIT // 2, "one below it arrives")
        await session.step(say("add 1"))
        many = [say("sleep 0.05"), *[say(f"big {_LIMIT - 100}")] * 6]
        require(len(await session.replay(many)) == 7, "large observations arrive however many wait together")


async def _memory(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        session, _ = await sandbox.open(spec(TASK))
        error = await refused(session.step(say("memory 1000000")), "memory beyond the sandbox's bound")
        require("MemoryError" in error.failure.message, "memory beyond the sandbox's bound is named so")
        await session.step(say("memory 1"))


async def _broken(make_backend: MakeBackend) -> None:
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        session, _ = await sandbox.open(spec(TASK))
        error = await refused(session.step(say("error")), "an environment that raises")
        require(error.failure.kind is FailureKind.ENVIRONMENT, "an environment that raises is to blame itself")
        error = await refused(session.step(say("nan")), "a reward that is not a number")
        require(error.failure.kind is FailureKind.BAD_REWARD, "a reward that is not a number is named so")
        await session.step(say("badgrade"))
        error = await refused(session.evaluate(), "a grading that raises")
        require(error.failure.kind is FailureKind.ENVIRONMENT, "a grading that raises is the environment's failure")
        await session.step(say("add 1"))


async def _opening(make_backend: MakeBackend) -> None:
    for task, kind in (("open_crash", FailureKind.SANDBOX_LOST), ("open_hang", FailureKind.SANDBOX_HUNG)):
        async with one_sandbox(make_backend) as (_, sandbox, _task):
            opening = asyncio.create_task(sandbox.open(spec(task, step_timeout_s=STEP_LIMIT_S)), name="opening")
            failure = await until_lost(sandbox)
            require(failure.kind is kind, f"{task} is reported as {kind}, not {failure.kind}")
            lost = await loses(opening, task)
            require(lost.suspect and lost.failure.stage == "open", f"{task}: the opening is the suspect")
    async with one_sandbox(make_backend) as (_, sandbox, _task):
        error = await refused(sandbox.open(spec("open_error")), "an opening that raises")
        require(error.failure.kind is FailureKind.ENVIRONMENT, "an opening that raises is the environment's failure")
        await play(sandbox, TASK, seed=1)


FAULT_CHECKS: Final[Mapping[str, Check]] = {
    "slow_step": _slow_step,
    "own_order": _own_order,
    "crash": _crash,
    "abort": _abort,
    "hang_in_c": _hang_in_c,
    "spin": _spin,
    "overlong_wait": _overlong_wait,
    "kill": _kill,
    "stop": _stop,
    "idle_kill": _idle_kill,
    "oversized": _oversized,
    "memory": _memory,
    "broken": _broken,
    "opening": _opening,
}
"""The checks that need the toy's scripted faults, by name."""

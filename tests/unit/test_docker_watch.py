"""What a container's sandbox is told of its end, for every way in which the daemon may answer when it is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from backends.sandboxes.docker import container as module
from backends.sandboxes.docker.container import Container
from backends.sandboxes.docker.port import (
    ContainerState,
    EngineError,
    EngineGone,
    EngineRefused,
    EngineTimeout,
    NotThere,
)
from orchestrator.types import Failure, FailureKind, SandboxId

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNNING = ContainerState("id", running=True, paused=False, pid=7, exit_code=0, oom_killed=False, error="")
KILLED = ContainerState("id", running=False, paused=False, pid=0, exit_code=137, oom_killed=False, error="")
CLOSED = Failure(FailureKind.SANDBOX_LOST, "call", "the connection was closed")


class Daemon:
    """Answers `inspect` with these, one after the other; the last one from then on."""

    def __init__(self, answers: Sequence[ContainerState | EngineError]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def inspect(self, container: str) -> ContainerState:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, EngineError):
            raise answer
        return answer


class Watched:
    """A container that is watched, its connection, and the end of its output."""

    def __init__(self, *answers: ContainerState | EngineError) -> None:
        loop = asyncio.get_running_loop()
        self.daemon = Daemon(answers)
        self.told: list[Failure] = []
        self.connection: asyncio.Future[Failure] = loop.create_future()
        self.output: asyncio.Future[None] = loop.create_future()
        blueprint: Any = SimpleNamespace(memory_mb=64)
        engine: Any = self.daemon
        tasks: Any = None
        sandbox: Any = SimpleNamespace(ended=self.connection, condemn=self.told.append)
        output: Any = self.output
        watching = Container(SandboxId("box"), blueprint, engine, tasks)._watch(sandbox, output)
        self.task = asyncio.create_task(watching, name="watch")

    async def end(self) -> Failure:
        await self.task
        [failure] = self.told
        return failure


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.0)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_container_that_has_ended_says_how() -> None:
    watched = Watched(KILLED)
    watched.output.set_result(None)
    assert "SIGKILL" in (await watched.end()).message


async def test_a_closed_connection_to_a_container_that_lives_is_waited_on_once() -> None:
    watched = Watched(RUNNING)
    watched.connection.set_result(CLOSED)
    assert await watched.end() is CLOSED
    assert watched.daemon.asked == 1


async def test_what_broke_the_protocol_is_told_without_asking() -> None:
    watched = Watched(KILLED)
    broken = Failure(FailureKind.PROTOCOL, "call", "an answer to no call")
    watched.connection.set_result(broken)
    assert await watched.end() is broken
    assert watched.daemon.asked == 0


async def test_a_container_that_was_removed_is_gone() -> None:
    watched = Watched(NotThere("no such container", 404))
    watched.output.set_result(None)
    assert "the container is gone" in (await watched.end()).message


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (EngineGone("refused"), "the Docker daemon is gone, and the sandbox with it"),
        (EngineTimeout("inspect: no answer within 30 s"), "nobody knows why: inspect: no answer within 30 s"),
        (EngineRefused("inspect: internal error", 500), "nobody knows why: inspect: internal error"),
    ],
)
async def test_a_daemon_that_cannot_tell_ends_no_sandbox_that_answers(answer: EngineError, says: str) -> None:
    watched = Watched(answer)
    watched.output.set_result(None)
    await turns()
    assert watched.told == []
    watched.connection.set_result(CLOSED)
    assert says in (await watched.end()).message


async def test_a_daemon_that_is_back_says_how_it_ended() -> None:
    watched = Watched(EngineGone("refused"), KILLED)
    watched.output.set_result(None)
    await turns()
    watched.connection.set_result(CLOSED)
    assert "SIGKILL" in (await watched.end()).message

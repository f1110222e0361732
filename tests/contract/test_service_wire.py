"""Our own wire, as a service offers it: the conformance kit, whole runs over it, and what ends its sessions."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
import orjson
import pytest

from backends.sandboxes.local import LocalBackend
from backends.sandboxes.remote import RemoteBackend
from backends.server.wire import MAX_FRAME, Answer, Op, Status, decode_answers, encode
from orchestrator import Orchestrator
from orchestrator.errors import SandboxError
from orchestrator.service import Service, ServiceLimits
from orchestrator.testing import BACKEND_CHECKS, run_check
from orchestrator.testing.leaks import processes
from orchestrator.types import EpisodeSpec, RunId
from policies.agents.replay import ReplayPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def serving(*environments: str, sandboxes: int = 1, **limits: float) -> AsyncIterator[Service]:
    backends = {name: partial(LocalBackend, name) for name in environments}
    wanted = ServiceLimits(**{"step_s": 60.0, "wait_s": 10.0} | limits)  # type: ignore[arg-type]
    async with Service(backends, port=0, sandboxes=sandboxes, tokens={"us": "t"}, limits=wanted) as service:
        yield service


@pytest.mark.parametrize("name", BACKEND_CHECKS)
async def test_the_contract_over_a_service(name: str) -> None:
    async with serving("toy") as service:
        await run_check(BACKEND_CHECKS[name], lambda: RemoteBackend(service.url, environment="toy", token="t"))
        assert service.health()["instances"] == 0


async def test_a_run_over_a_service_is_right_though_its_sandboxes_are_killed(tmp_path: Path) -> None:
    async with serving("toy", "bfcl", sandboxes=2) as service:
        backend = RemoteBackend(service.url, environment="bfcl", token="t")
        run = Orchestrator(backend=backend, policy=ReplayPolicy(), out=tmp_path / "run", concurrency=64, sandboxes=1)
        async with run as orchestrator:
            running = asyncio.create_task(orchestrator.run(split="multi_turn", episodes=200))
            while service.health()["instances"] < 32:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)
            mine = [p for p in processes() if "--environment bfcl" in p.command and p.parent == os.getpid()]
            os.kill(next(p.pid for p in mine if "--with-solutions" not in p.command), signal.SIGKILL)
            summary = await running
        assert (summary.episodes, summary.reward_one, summary.failures) == (200, 200, {})
        assert service.health()["instances"] == 0


async def test_sessions_end_with_their_connection_and_not_for_being_idle() -> None:
    async with serving("toy", idle_s=0.1) as service:
        backend = RemoteBackend(service.url, environment="toy", token="t")
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            await asyncio.sleep(0.5)
            said = orjson.dumps({"role": "assistant", "content": "add 1"})
            assert b"total 1" in (await session.step(said)).body
            assert service.health()["instances"] == 1
        async with asyncio.timeout(3):
            while service.health()["instances"]:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)


async def test_a_full_service_refuses_an_episode_and_says_that_it_may_be_tried_again() -> None:
    async with serving("toy", instances=1) as service:
        backend = RemoteBackend(service.url, environment="toy", token="t")
        backend.configure(run=RunId("r"), with_solutions=False, logs=None, call_limit_s=30.0)
        async with backend:
            sandbox = await backend.create()
            session, _ = await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            with pytest.raises(SandboxError, match="1 instances live") as refused:
                await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))
            assert refused.value.failure.retryable
            session.close()
            await sandbox.open(EpisodeSpec("toy_0", 0, 5.0))


@asynccontextmanager
async def connected(service: Service, environment: str = "toy") -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A client that speaks the wire by hand."""
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer t"}) as http:
        socket = await http.ws_connect(f"{service.url}/wire?env={environment}", max_msg_size=MAX_FRAME)
        await socket.receive_str(timeout=5)
        yield socket
        await socket.close()


async def asked(socket: aiohttp.ClientWebSocketResponse, *calls: tuple[int, int, int, int, bytes]) -> list[Answer]:
    """The answers to calls, and what was said unasked, in the order of their coming."""
    await socket.send_bytes(encode([[*call[:4], len(call[4])] for call in calls], [call[4] for call in calls]))
    answers: list[Answer] = []
    while sum(answer[0] > 0 for answer in answers) < len(calls):
        answers += decode_answers(await socket.receive_bytes(timeout=20))
    return answers


def opening(task: str, **more: object) -> bytes:
    return orjson.dumps({"task": task, "seed": 0, "options": {}, **more})


async def test_a_tool_set_is_sent_once_a_connection() -> None:
    async with serving("bfcl") as service, connected(service, "bfcl") as socket:
        body = opening("multi_turn_base_0")
        answers = [*await asked(socket, (1, Op.OPEN, 1, 0, body)), *await asked(socket, (2, Op.OPEN, 2, 0, body))]
        assert [(call, status) for call, status, *_ in answers] == [(0, Status.TOOLSET), (1, Status.OK), (2, Status.OK)]


async def test_a_call_that_takes_too_long_costs_its_own_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps, adds = (orjson.dumps({"role": "assistant", "content": words}) for words in ("sleep 30", "add 1"))
    async with serving("toy") as service, connected(service) as socket:
        await asked(socket, (1, Op.OPEN, 1, 0, opening("toy_0")), (2, Op.OPEN, 2, 0, opening("toy_0")))
        monkeypatch.setattr(ServiceLimits, "call_s", 1.0)
        calls = ((3, Op.STEP, 1, 1, sleeps), (4, Op.STEP, 1, 2, adds), (5, Op.STEP, 2, 1, adds))
        answers = {call: (status, body) for call, status, _, _, body in await asked(socket, *calls)}
        assert orjson.loads(answers[3][1]) == {"code": "busy", "message": "the call took too long", "retryable": True}
        assert b"total 1" in answers[4][1]  # the episode stands where it stood before
        assert b"total 1" in answers[5][1]


async def test_a_client_may_ask_for_a_shorter_step() -> None:
    spins = orjson.dumps({"role": "assistant", "content": "spin"})
    async with serving("toy", step_s=60.0) as service, connected(service) as socket:
        await asked(socket, (1, Op.OPEN, 1, 0, opening("toy_0", step_timeout_s=0.3)))
        async with asyncio.timeout(20):  # three times its limit, and sandboxes started anew
            ((_, status, _, _, body),) = await asked(socket, (2, Op.STEP, 1, 1, spins))
        assert (status, orjson.loads(body)["code"]) == (Status.ERROR, "step_timeout")


@pytest.mark.parametrize(
    ("calls", "code"),
    [
        ([(9, Op.STEP, 7, 0, b"{}")], "unknown_session"),
        ([(9, Op.OPEN, 1, 1, opening("toy_0"))], "out_of_order"),
        ([(9, Op.OPEN, 1, 0, opening("none"))], "unknown_task"),
        ([(9, Op.OPEN, 1, 0, b"[]")], "bad_request"),
        ([(9, Op.OPEN, 1, 0, b"{}")], "bad_request"),
        ([(9, Op.TASKS, 0, 0, b'{"split": "toyy"}')], "unknown_split"),
        ([(9, Op.SOLUTION, 0, 0, b'{"task": "toy_0"}')], "forbidden"),
        ([(1, Op.OPEN, 1, 0, opening("toy_0")), (9, Op.OPEN, 1, 1, opening("toy_0"))], "bad_request"),
        ([(1, Op.OPEN, 1, 0, opening("toy_0")), (9, Op.STEP, 1, 5, b"{}")], "out_of_order"),
        ([(1, Op.OPEN, 1, 0, opening("toy_0")), (9, 77, 1, 1, b"")], "bad_request"),
    ],
)
async def test_what_the_wire_refuses(calls: list[tuple[int, int, int, int, bytes]], code: str) -> None:
    async with serving("toy") as service, connected(service) as socket:
        answers = {call: (status, body) for call, status, _, _, body in await asked(socket, *calls)}
        assert (answers[9][0], orjson.loads(answers[9][1])["code"]) == (Status.ERROR, code)
        (ping,) = await asked(socket, (10, Op.PING, 0, 0, b""))
        assert ping[1] == Status.OK
        assert service.health()["instances"] == len(calls) - 1  # what was refused holds no place


async def test_a_session_that_is_closed_gives_its_place_back_and_its_number_is_free() -> None:
    async with serving("toy", instances=1) as service, connected(service) as socket:
        for number in (1, 4, 7):
            answers = await asked(socket, (number, Op.OPEN, 1, 0, opening("toy_0")))
            assert [status for _, status, *_ in answers] == [Status.OK]
            sleeps = orjson.dumps({"role": "assistant", "content": "sleep 30"})
            calls = [[number + 1, Op.STEP, 1, 1, len(sleeps)], [number + 2, Op.CLOSE, 1, 2, 0]]
            await socket.send_bytes(encode(calls, [sleeps, b""]))  # closed in the middle of a call


async def test_sessions_whose_records_take_the_memory_they_may_take_no_step_until_one_is_closed() -> None:
    long, adds = (orjson.dumps({"role": "assistant", "content": words}) for words in ("x" * 150_000, "add 1"))
    async with serving("toy", record_bytes=100_000) as service, connected(service) as socket:
        await asked(socket, (1, Op.OPEN, 1, 0, opening("toy_0")), (2, Op.OPEN, 2, 0, opening("toy_0")))
        assert service.health()["record_bytes"] > 0
        await asked(socket, (3, Op.STEP, 1, 1, long))
        for call, session, seq in ((4, 1, 2), (5, 2, 1)):
            ((_, status, _, _, body),) = await asked(socket, (call, Op.STEP, session, seq, adds))
            assert (status, orjson.loads(body)["retryable"]) == (Status.ERROR, True)
        await socket.send_bytes(encode([[6, Op.CLOSE, 1, 3, 0]], []))
        ((_, status, _, _, body),) = await asked(socket, (7, Op.STEP, 2, 2, adds))
        assert (status, b"total 1" in body) == (Status.OK, True)
        await socket.send_bytes(encode([[8, Op.CLOSE, 2, 3, 0]], []))
        await asked(socket, (9, Op.PING, 0, 0, b""))
        assert service.health()["record_bytes"] == 0


async def test_a_service_that_ends_admits_nobody_and_says_so() -> None:
    async with serving("toy") as service, connected(service) as socket:
        assert await service.drain()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connected(service):
                pass
        assert refused.value.status == 503
        ((_, status, _, _, body),) = await asked(socket, (1, Op.OPEN, 1, 0, opening("toy_0")))
        assert (status, orjson.loads(body)["retryable"]) == (Status.ERROR, True)
        ending = asyncio.create_task(service.__aexit__(None, None, None))
        message = await socket.receive(timeout=5)
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY)
        await ending

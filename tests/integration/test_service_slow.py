"""Clients that trickle, say nothing, take all connections, or do not read what they asked for."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from serving import client, say, serving

from backends.server.wire import MAX_CALLS, MAX_FRAME, Op, decode_answers, encode
from orchestrator.service import ServiceLimits, door, replies, wire

if TYPE_CHECKING:
    from orchestrator.service import Service

BIG = 3_000_000
SESSIONS = 10


async def connected(made: Service, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(made.url.rpartition(":")[2]))
    writer.write(said)
    await writer.drain()
    return reader, writer


async def until(made: Service, name: str, value: Any) -> None:
    async with asyncio.timeout(10):
        while made.health()[name] != value:  # noqa: ASYNC110  # it signals nothing
            await asyncio.sleep(0.01)


async def test_a_body_that_trickles_is_not_waited_for() -> None:
    async with serving(limits=ServiceLimits(body_s=0.2)) as made:
        reader, writer = await connected(made, b"POST /step HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n{")
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


@pytest.mark.parametrize("said", [b"", b"POST /step HTTP/1.1\r\nHost: x\r\nX-Never-en"])
async def test_a_connection_without_a_request_is_closed(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "QUIET_S", 0.2)
    async with serving() as made:
        reader, writer = await connected(made, said)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_connections_that_there_is_no_room_for_are_told() -> None:
    async with serving(limits=ServiceLimits(connections=2)) as made:
        writers = [(await connected(made))[1] for _ in range(2)]
        await asyncio.sleep(0.05)  # until they are accepted
        async with client(made) as http, http.http.post(f"{made.url}/create", data=b"{}") as response:
            assert (response.status, "Retry-After" in response.headers) == (503, True)
            assert "no room for more connections" in (await response.json())["detail"]
        for writer in writers:
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.05)
        async with client(made) as http:
            await http.done("create", task_id="toy_0")


def test_connections_leave_files_for_the_sandboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((1024, 768), (100, 1), (1_000_000, 8192), (resource.RLIM_INFINITY, 8192)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert door.room(8192) == most


async def test_what_is_no_http_costs_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as made:
        for noise in (b"\x16\x03\x01\x02\x00", b"GET /" + b"a" * 9000, b"POST / HTTP/1.1\r\nContent-Length: -1"):
            reader, writer = await connected(made, noise + b"\r\n\r\n")
            async with asyncio.timeout(5):
                assert b" 400 " in await reader.readline()
            writer.close()
    assert caplog.records == []


async def test_a_client_that_does_not_read_is_not_given_without_end() -> None:
    async with serving() as made, client(made) as http:
        socket = await http.http.ws_connect(f"{made.url}/wire", max_msg_size=MAX_FRAME)
        await socket.receive_str()
        opening = orjson.dumps({"task": "toy_0", "seed": 0, "options": {}})
        await socket.send_bytes(calls(1, Op.OPEN, 0, opening))
        action = orjson.dumps(say(f"big {BIG}"))
        rounds = 2 * replies.MAX_UNSENT // (SESSIONS * BIG) + 2
        for seq in range(1, rounds + 1):
            await socket.send_bytes(calls(1 + seq * SESSIONS, Op.STEP, seq, action))
        async with asyncio.timeout(20):
            while (unsent := made.health()["wire_unsent_bytes"]) <= replies.MAX_UNSENT:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # nothing more is begun
        assert made.health()["wire_unsent_bytes"] <= max(unsent, replies.MAX_UNSENT) + SESSIONS * BIG + MAX_FRAME
        answered = 0
        while answered < SESSIONS * (rounds + 1):  # once it reads, every call has its answer
            frame = await socket.receive_bytes(timeout=20)
            assert all(status in {0, 2} for _, status, *_ in decode_answers(frame))
            answered += sum(call > 0 for call, *_ in decode_answers(frame))
        assert made.health()["wire_unsent_bytes"] == 0
        await socket.close()


async def test_refusals_that_are_not_read_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "MAX_UNSENT", 100_000)
    nobodys = encode([[n, Op.STEP, n, 0, 0] for n in range(1, MAX_CALLS)], [])
    async with serving() as made, client(made) as http:
        socket = await http.http.ws_connect(f"{made.url}/wire", timeout=aiohttp.ClientWSTimeout(ws_close=0.1))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                for _ in range(80):  # 30 MB of refusals, more than the kernel takes
                    await socket.send_bytes(nobodys)
        await asyncio.sleep(0.3)
        assert 0 < made.health()["wire_unsent_bytes"] < 1_000_000
        await socket.close()


async def test_calls_that_wait_are_bounded_in_bytes_and_forgotten_with_their_session() -> None:
    sleeps = orjson.dumps(say("sleep 60" + " " * 1_000_000))
    opening = orjson.dumps({"task": "toy_0", "seed": 0, "options": {}})
    async with serving(limits=ServiceLimits(step_s=60.0)) as made, client(made) as http:
        socket = await http.http.ws_connect(f"{made.url}/wire", timeout=aiohttp.ClientWSTimeout(ws_close=0.1))
        await socket.receive_str()

        async def pile(session: int, steps: int) -> None:
            await socket.send_bytes(encode([[1, Op.OPEN, session, 0, len(opening)]], [opening]))
            for seq in range(1, steps):
                await socket.send_bytes(encode([[1, Op.STEP, session, seq, len(sleeps)]], [sleeps]))
            await socket.send_bytes(encode([[1, Op.CLOSE, session, steps, 0], [session, Op.PING, 0, 0, 0]], []))
            await answered(socket, session, seconds=5.0)

        for session in range(2, 6):  # four times nearly as much as may wait at once, each time closed
            await pile(session, 32)
        with pytest.raises(TimeoutError):  # more than may wait is not even read
            await pile(6, 36)
        await socket.close()


async def test_calls_that_wait_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PENDING", 5 * SESSIONS)
    sleeps = orjson.dumps(say("sleep 60"))
    async with serving(limits=ServiceLimits(step_s=60.0)) as made, client(made) as http:
        socket = await http.http.ws_connect(f"{made.url}/wire", timeout=aiohttp.ClientWSTimeout(ws_close=0.1))
        await socket.receive_str()
        await socket.send_bytes(calls(1, Op.OPEN, 0, orjson.dumps({"task": "toy_0", "seed": 0, "options": {}})))
        for seq in range(1, 10):
            await socket.send_bytes(calls(100 * seq, Op.STEP, seq, sleeps))
        await socket.send_bytes(encode([[5000, Op.PING, 0, 0, 0]], []))
        with pytest.raises(TimeoutError):
            await answered(socket, 5000, seconds=1.0)
        await socket.close()


async def answered(socket: aiohttp.ClientWebSocketResponse, call: int, *, seconds: float) -> None:
    """Until a call has its answer. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while all(number != call for number, *_ in decode_answers(await socket.receive_bytes())):
            pass


def calls(first: int, op: Op, seq: int, body: bytes) -> bytes:
    header = [[first + n, op, n, seq, len(body)] for n in range(SESSIONS)]
    return encode(header, [body] * SESSIONS)


async def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "SEND_S", 0.3)
    async with serving() as made, client(made) as http:
        socket = await http.http.ws_connect(f"{made.url}/wire")
        await socket.send_bytes(calls(1, Op.OPEN, 0, orjson.dumps({"task": "toy_0", "seed": 0, "options": {}})))
        await socket.send_bytes(calls(20, Op.STEP, 1, orjson.dumps(say(f"big {BIG}"))))
        await until(made, "instances", SESSIONS)
        await until(made, "wire_connections", 0)
        assert made.health()["instances"] == 0
        await socket.close()

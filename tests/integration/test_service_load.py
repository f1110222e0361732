"""A service under many instances and many hostile requests: no 500, nothing lost, nothing leaked."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from serving import client, say, serving

from orchestrator.service import ServiceLimits
from orchestrator.testing.leaks import processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.service import Service

pytestmark = pytest.mark.timeout(300)
INSTANCES = 2000
HOSTILE = 10_000
AT_ONCE = 100

ROUTES = ("create", "step", "evaluate", "release", "get_info", "get_env_profile", "call_tool", "create_from_pool",
          "list_tools_async", "cleanup", "..%2f..%2fetc", "healthz", "wire", "step/", "\u202e")  # fmt: skip
NAMES: tuple[Any, ...] = (None, "", "x", "live_1", "../../etc/passwd", "\x00", "a" * 5000, 7, 1e308, True, [], {}, "💥")


def objects(rng: random.Random, depth: int = 0) -> Any:
    """JSON of any shape."""
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(NAMES)
    if rng.random() < 0.5:
        return [objects(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(("role", "content", "tool_calls", "name", "")): objects(rng, depth + 1) for _ in range(3)}


def bodies(rng: random.Random) -> bytes:
    """A body as nobody should send it, or one that is nearly right. No action of it is a good one."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return b"[" * rng.randrange(100, 50_000)
    if kind == 2:
        return b'{"instance_id": "' + b"\xed\xa0\x80" + b'"}'
    fields = ("env_type", "task_id", "instance_id", "messages", "params", "identity", "tool_name", "arguments", "split")
    value = {name: objects(rng) for name in rng.sample(fields, rng.randrange(len(fields)))}
    if kind == 3:
        value |= {"instance_id": "live_1", "messages": {"role": "user", "content": objects(rng)}}
    if kind == 4:
        value |= {"task_id": "toy_0", "instance_id": "live_1"}
    if kind == 5:
        value |= {"messages": {"content": "x" * rng.randrange(1, 300_000)}}
    return orjson.dumps(value)


async def bounded(count: int, each: Callable[[int], Any]) -> None:
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await each(number)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())


async def test_two_thousand_instances_and_ten_thousand_hostile_requests() -> None:
    limits = ServiceLimits(step_s=30.0)
    async with serving("toy", limits=limits) as made, client(made) as http:
        before = sandboxes()

        async def create(number: int) -> None:
            await http.done("create", task_id=f"toy_{number % 64}", instance_id=f"live_{number}")
            await http.done("step", instance_id=f"live_{number}", messages=say("add 1"))

        await bounded(INSTANCES, create)
        assert made.health()["instances"] == INSTANCES
        statuses = await hostile(made, http.http)
        assert {status for status in statuses if status >= 500} <= {503}
        assert sum(statuses.values()) == HOSTILE
        assert statuses[400] + statuses[404] + statuses[422] > HOSTILE / 2

        async def finish(number: int) -> None:
            if number != 1:  # the one that all of them aimed at
                target = 1 + number % 64 % 7
                await http.done("step", instance_id=f"live_{number}", messages=say(f"add {target - 1}"))
                assert await http.done("evaluate", instance_id=f"live_{number}") == 1.0
            await http.post("release", instance_id=f"live_{number}")

        await bounded(INSTANCES, finish)
        health = made.health()
        assert (health["status"], health["calls"]) == ("healthy", 0)
        assert health["instances"] <= statuses[200]  # those that a hostile request has made
        assert sandboxes() == before


def sandboxes() -> set[int]:
    return {one.pid for one in processes() if "backends.server" in one.command and one.parent == os.getpid()}


async def hostile(made: Service, http: aiohttp.ClientSession) -> Counter[int]:
    rng = random.Random(20)
    statuses: Counter[int] = Counter()
    requests = [(rng.choice(("POST",) * 6 + ("GET", "PUT")), rng.choice(ROUTES), bodies(rng)) for _ in range(HOSTILE)]

    async def send(number: int) -> None:
        method, route, body = requests[number]
        async with http.request(method, f"{made.url}/{route}", data=body) as response:
            said = await response.read()
            statuses[response.status] += 1
            if response.status in {429, 503}:
                assert "Retry-After" in response.headers
            if response.status >= 400:
                assert list(orjson.loads(said)) == ["detail"], (response.status, said[:200])
                assert b"Traceback" not in said

    await bounded(HOSTILE, send)
    return statuses


async def test_requests_that_are_not_http_end_their_connection_only() -> None:
    rng = random.Random(3)
    async with serving("toy") as made, client(made) as http:
        port = int(made.url.rpartition(":")[2])
        for number in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            noise = rng.randbytes(300) if number % 2 else b"POST /step HTTP/1.1\r\nContent-Length: 99999\r\n\r\n{"
            writer.write(noise + b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
        await http.done("create", task_id="toy_0", instance_id="a")
        assert made.health()["status"] == "healthy"


@pytest.mark.parametrize("noise", [b"", b"\x00", b"\xff" * 50, b"\x04\x00\x00\x00[[1]]", b"\x02\x00\x00\x00[]xx"])
async def test_noise_on_the_wire_ends_its_connection_only(noise: bytes) -> None:
    async with serving("toy") as made, client(made) as http:
        async with http.http.ws_connect(f"{made.url}/wire") as socket:
            await socket.receive_str()
            await socket.send_bytes(noise)
            message = await socket.receive(timeout=5)
            assert message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
        await http.done("create", task_id="toy_0", instance_id="a")
        async with asyncio.timeout(3):
            while made.health()["wire_connections"]:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)

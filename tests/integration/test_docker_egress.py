"""A container that may reach one place: it does, by itself and through its server's variables; and nothing else."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.hardening import Hardening
from bench.strikes import docker, inside
from orchestrator.errors import UsageError
from orchestrator.testing.harness import entered, play

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.usefixtures("containers")

PROGRAM = """
import json, socket, urllib.request

def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)

def connect(address):
    try:
        socket.create_connection(address, timeout=2).close()
        return True
    except OSError:
        return False

allowed, other = PORTS
print(json.dumps({
    "allowed": fetch(f"http://127.0.0.1:{allowed}/x"),
    "another port": fetch(f"http://127.0.0.1:{other}/x"),
    "by name": fetch(f"http://host.invalid:{allowed}/x"),
    "metadata": fetch("http://169.254.169.254/latest"),
    "bridge": fetch("http://172.17.0.1:22/"),
    "the world": fetch("http://example.com/"),
    "with tls": fetch("https://example.com/"),
    "directly": [connect(one) for one in (("127.0.0.1", allowed), ("172.17.0.1", 22), ("1.1.1.1", 53))],
    "interfaces": [name for _, name in socket.if_nameindex() if name not in ("lo", "tunl0", "sit0", "ip6tnl0")],
}))
"""


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """A server on this machine's loopback."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nyou asked " + line.split()[1])
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_what_is_listed_is_reached_and_nothing_else() -> None:
    async with served() as port, served() as other:
        hardening = Hardening(egress=(f"127.0.0.1:{port}",))
        async with entered(lambda: DockerBackend("toy", hardening=hardening)) as backend:
            sandbox, neighbour = await backend.create(), await backend.create()
            program = PROGRAM.replace("PORTS", f"{port}, {other}")
            got = json.loads(await asyncio.to_thread(inside, sandbox.id, program))
            [shown] = json.loads(await asyncio.to_thread(docker, "inspect", sandbox.id))
            await play(sandbox, "toy_3", seed=1)
            await play(neighbour, "toy_3", seed=1)
    assert got.pop("allowed") == [200, "you asked /x"]
    assert got.pop("directly") == [False] * 3, "there is no other way out"
    assert got.pop("interfaces") == []
    assert shown["HostConfig"]["NetworkMode"] == "none"
    assert "403" in got.pop("with tls")[1]
    assert {name: status for name, (status, _) in got.items()} == dict.fromkeys(got, 403)


async def test_without_a_list_there_is_no_proxy() -> None:
    async with entered(lambda: DockerBackend("toy")) as backend:
        sandbox = await backend.create()
        [shown] = json.loads(await asyncio.to_thread(docker, "inspect", sandbox.id))
        assert not any("proxy" in variable.lower() for variable in shown["Config"]["Env"])
        assert len(shown["Mounts"]) == 1


async def test_nothing_of_it_is_left() -> None:
    networks = await asyncio.to_thread(docker, "network", "ls", "-q")
    backend = DockerBackend("toy", hardening=Hardening(egress=("example.org:443",)))
    async with entered(lambda: backend):
        sandbox = await backend.create()
        private = backend.private
        assert await asyncio.to_thread(lambda: list(private.glob("*-egress")))
        await backend.destroy(sandbox.id)
        assert not await asyncio.to_thread(lambda: list(private.glob("*-egress")))
    assert await asyncio.to_thread(docker, "network", "ls", "-q") == networks


def test_a_destination_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"egress: .*give HOST:PORT"):
        DockerBackend("toy", hardening=Hardening(egress=("example.org",)))

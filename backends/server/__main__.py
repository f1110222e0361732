"""`python -m backends.server --environment NAME`: a sandbox. Dials out, serves sessions, dies with its owner.

The first line of standard input is a JSON object: `socket` (a unix socket's path), or `url` and the `certificate` (PEM)
that alone is trusted there; `token`, `digest`; optional `max_body` (bytes), `memory_mb`, `egress` (the socket of a
proxy, to be reached at a port of loopback), and `guarded`: whether this process hides its memory and its files from
others of the same user, as the agent's code may be.
Standard input stays open for as long as the owner lives: its end, or the death of the parent process, ends the server
at once. The command line never carries a secret.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import os
import resource
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from backends.server import family, forward, processes, zygote
from backends.server.environment import GradesElsewhere
from backends.server.sessions import Sessions
from backends.server.trust import trusted
from backends.server.wire import MAX_BODY, MAX_CHILDREN, MAX_FRAME, PROTOCOL, Hello, WireError, decode_calls, encode

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from backends.server.environment import Environment
    from backends.server.sessions import Opener

FLUSH_S: Final = 0.002
"""Replies of a long batch leave at least this often, so that the orchestrator works while the batch goes on."""
FLUSH_BYTES: Final = 256 * 1024


def main() -> None:
    """Read the configuration, load the environment, serve until the connection or the owner ends."""
    parser = argparse.ArgumentParser(prog="python -m backends.server")
    parser.add_argument("--environment", required=True)
    parser.add_argument("--run", default="", help="label: the run that owns this server")
    parser.add_argument("--owner", default="", help="label: the process that owns this server")
    parser.add_argument("--with-solutions", action="store_true", help="answer for known solutions (replay only)")
    parser.add_argument("--isolation", choices=("shared", "process"), default="shared", help="the environment's own")
    arguments = parser.parse_args()
    family.die_with_parent(os.getppid())

    def load() -> Environment:
        return _load(arguments.environment, arguments.isolation)

    line = zygote.start(load) if arguments.isolation == "process" else None
    config: dict[str, Any] = orjson.loads(_read_line())
    if config.get("guarded"):
        family.hide(hidden=True)
    if proxy := config.get("egress"):
        forward.start(proxy)
    if line is not None:
        _begin(line, config)
    elif memory_mb := config.get("memory_mb"):
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_mb) << 20, int(memory_mb) << 20))
    environment = load()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    asyncio.run(_serve(environment, config, line, solutions=arguments.with_solutions))


def _load(name: str, isolation: str) -> Environment:
    """The environment of that name. Raises SystemExit where it is not the kind that it was started as."""
    module = importlib.import_module(f"backends.environments.{name}.inside")
    environment: Environment = module.environment()
    if environment.isolation != isolation:
        raise SystemExit(
            f"{name} has isolation {environment.isolation!r}: start it with --isolation {environment.isolation}"
        )
    if environment.runs_code and isolation == "process" and not isinstance(environment, GradesElsewhere):
        raise SystemExit(f"{name} runs the agent's code: give it a `grade`, and its sessions an `export`")
    return environment


def _begin(line: socket.socket, config: dict[str, Any]) -> None:
    """Tell the zygote how, and leave the pipe's end to it."""
    life = config.get("life")
    order = {
        "memory_mb": int(config.get("memory_mb") or 0),
        "hidden": bool(config.get("guarded")),
        "life": [] if life is None else [int(life)],
    }
    line.send(orjson.dumps(["begin", order]))
    if life is not None:
        os.close(life)
    family.adopt_orphans()  # of a zygote that is killed


def _read_line() -> bytes:
    """The first line of standard input, unbuffered: what follows belongs to the watch for its end."""
    line = bytearray()
    while byte := os.read(0, 1):
        if byte == b"\n":
            return bytes(line)
        line += byte
    raise SystemExit("standard input ended before the configuration")


def _owner_gone() -> None:
    if not os.read(0, 4096):
        os._exit(0)


async def _serve(
    environment: Environment, config: dict[str, Any], line: socket.socket | None, *, solutions: bool
) -> None:
    asyncio.get_running_loop().add_reader(0, _owner_gone)
    async with AsyncExitStack() as stack:
        opener: Opener = environment
        if line is not None:
            opener = await stack.enter_async_context(_processes(environment, config, line))
        await _connect(environment, config, partial(_Connection, opener, config, solutions=solutions))


def _processes(environment: Environment, config: dict[str, Any], line: socket.socket) -> processes.Processes:
    return processes.Processes(
        environment,
        line,
        max_body=int(config.get("max_body", MAX_BODY)),
        max_children=int(config.get("max_children", MAX_CHILDREN)),
        lost=processes.give_up,
    )


async def _connect(
    environment: Environment,
    config: dict[str, Any],
    converse: Callable[[aiohttp.ClientWebSocketResponse], _Connection],
) -> None:
    path = config.get("socket")
    connector = aiohttp.UnixConnector(path) if path else aiohttp.TCPConnector(ssl=trusted(config.get("certificate")))
    timeout = aiohttp.ClientWSTimeout(ws_close=5.0)
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.ws_connect(
            config.get("url", "http://orchestrator/"), max_msg_size=MAX_FRAME, compress=0, timeout=timeout
        ) as socket,
    ):
        await socket.send_str(orjson.dumps(_hello(environment, config)._asdict()).decode())
        await converse(socket).run()


def _hello(environment: Environment, config: dict[str, Any]) -> Hello:
    return Hello(
        protocol=PROTOCOL,
        token=config["token"],
        environment=environment.name,
        digest=config["digest"],
        isolation=environment.isolation,
        deterministic=environment.deterministic,
        runs_code=environment.runs_code,
        max_turns=environment.max_turns,
        pid=os.getpid(),
    )


class _Connection:
    """Reads frames, runs their calls, sends replies: each as soon as it is done, many a frame."""

    def __init__(
        self,
        opener: Opener,
        config: dict[str, Any],
        socket: aiohttp.ClientWebSocketResponse,
        *,
        solutions: bool,
    ) -> None:
        self._socket = socket
        self._late = asyncio.Event()
        max_body = int(config.get("max_body", MAX_BODY))
        self._sessions = Sessions(opener, solutions=solutions, max_body=max_body, wake=self._late.set)

    async def run(self) -> None:
        late = asyncio.create_task(self._send_late(), name="late-replies")
        try:
            async for message in self._socket:
                if message.type != aiohttp.WSMsgType.BINARY:
                    raise WireError(f"a {message.type.name} message, not a binary frame")
                await self._batch(message.data)
        finally:
            late.cancel()

    async def _batch(self, frame: bytes) -> None:
        sessions = self._sessions
        flush_at = time.monotonic() + FLUSH_S
        for call in decode_calls(frame):
            now = time.monotonic()
            if now >= flush_at or sessions.waiting_bytes >= FLUSH_BYTES:
                await self._flush()
                await asyncio.sleep(0)
                now = time.monotonic()
                flush_at = now + FLUSH_S
            sessions.handle(call, now)
        await self._flush()

    async def _flush(self) -> None:
        self._sessions.watchdog.disarm()
        while self._sessions.waiting:
            header, bodies = self._sessions.take()
            await self._socket.send_bytes(encode(header, bodies))

    async def _send_late(self) -> None:
        """Send what steps that wait have answered since."""
        while True:
            await self._late.wait()
            self._late.clear()
            await self._flush()


if __name__ == "__main__":
    main()

"""The least that can start a sandbox's container and get an answer from it: create, start, open, one step.

The container is made from the same image with the same settings, and told the same on its standard input; then a plain
WebSocket server takes its connection and speaks two frames. Nothing is registered, watched, checked or cleaned up on
the way: the floor that a cold start of the backend is measured against.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Self

import orjson
from aiohttp import web

from backends.server.wire import MAX_FRAME, Op, Status, decode_answers, encode
from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from pathlib import Path

    from backends.sandboxes.docker.container import Blueprint
    from backends.sandboxes.docker.port import Engine


class BareStarter:
    """A socket to dial, and one container after the other. An async context manager."""

    def __init__(self, engine: Engine, blueprint: Blueprint, folder: Path, task: str, action: bytes) -> None:
        self._engine = engine
        self._blueprint = blueprint
        self._folder = folder
        self._frames = [
            encode([(1, Op.OPEN, 1, 0, len(opening))], [opening]) for opening in [orjson.dumps(_opening(task))]
        ] + [encode([(2, Op.STEP, 1, 1, len(action))], [action])]
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            application = web.Application()
            application.router.add_get("/", self._converse)
            runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            socket = self._folder / "orchestrator"
            await web.UnixSite(runner, str(socket)).start()
            await asyncio.to_thread(socket.chmod, 0o666)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def start(self, name: str) -> float:
        """Seconds from nothing to the first step's answer; the container is removed afterwards."""
        self._answered = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        await self._engine.create(name, self._blueprint.config(self._folder))
        attachment = await self._engine.attach(name)
        try:
            await self._engine.start(name)
            await attachment.write(self._blueprint.inside("bare"))
            async with asyncio.timeout(60):
                await self._answered
            return time.perf_counter() - began
        finally:
            await attachment.close()
            await self._engine.remove(name)

    async def _converse(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_FRAME, compress=False)
        await socket.prepare(request)
        await socket.receive_str()
        try:
            for number, frame in enumerate(self._frames, 1):
                await socket.send_bytes(frame)
                await _until_answered(socket, number)
        except RunFailed as error:
            self._answered.set_exception(error)
        else:
            self._answered.set_result(None)
        await socket.close()
        return socket


async def _until_answered(socket: web.WebSocketResponse, number: int) -> None:
    while True:
        for call, status, _, _, body in decode_answers(await socket.receive_bytes()):
            if call == number and status == Status.OK:
                return
            if call == number:
                raise RunFailed(f"the bare container refused: {body!r}")


def _opening(task: str) -> dict[str, Any]:
    return {"task": task, "seed": 0, "step_timeout_s": 30.0, "options": {}}

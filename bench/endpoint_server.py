"""The fake model endpoint's server: OpenAI's chat completions over HTTP, on loopback alone.

It answers with recorded conversations (`bench.answers`) or with one short text, after a set latency, and can be told
to fail, hang or talk nonsense at seeded rates. Usage counts follow from lengths, so that they are the same every time.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson
from aiohttp import web

from bench.answers import Answer, answer, digest, load_answers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MAX_REQUEST: Final = 64 * 1024 * 1024
_TEXT: Final = answer({"role": "assistant", "content": "I am done."})
_NONSENSE: Final = (b'{"choices": [{"mess', b"<html>502 Bad Gateway</html>", b'{"choices": []}', b"[]", b"\xff\xfe")


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How the endpoint behaves. Rates are shares of the calls (0 to 1); times are seconds."""

    port: int = 0
    """TCP port on 127.0.0.1; 0 lets the system choose."""
    socket: Path | None = None
    """A unix socket instead of a port."""
    answers: Path | None = None
    """What `bench.answers.write_answers` wrote; a conversation that is not in it is answered with status 400."""
    log: Path | None = None
    """Where answered calls are appended."""
    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Latency is uniform in latency_s plus or minus jitter_s."""
    fail_rate: float = 0.0
    """Answered with status 500 and 429 (with Retry-After) in turns."""
    hang_rate: float = 0.0
    """Never answered."""
    malformed_rate: float = 0.0
    """Answered with status 200 and a body that is no completion."""
    retry_after_s: float = 1.0
    seed: int = 0

    def arguments(self) -> list[str]:
        """The same as arguments of the command line."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]
        return [f"--{name.removesuffix('_s').replace('_', '-')}={value}" for name, value in given]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer, for scripts."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class EndpointStatistics(NamedTuple):
    """Counts since the start; `active` requests and `connections` are those open now."""

    requests: int
    answered: int
    failed: int
    hung: int
    malformed: int
    active: int
    connections: int


class Endpoint:
    """The endpoint in this process, as an async context manager.

    `script(request, index)` may give a Reply of its own for the index-th call; with None the options decide.
    """

    def __init__(
        self, options: EndpointOptions, script: Callable[[dict[str, Any], int], Reply | None] | None = None
    ) -> None:
        self.url = ""
        self._options = options
        self._script = script
        self._random = random.Random(options.seed)
        self._answers: dict[str, Answer] | None = None
        self._log = -1
        self._counts = {"requests": 0, "answered": 0, "failed": 0, "hung": 0, "malformed": 0, "active": 0}
        self._idle = asyncio.Event()
        self._idle.set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Endpoint:
        options = self._options
        if options.answers is not None:
            self._answers = await asyncio.to_thread(load_answers, options.answers)
        if options.log is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._log = await asyncio.to_thread(os.open, options.log, flags, 0o644)
        app = web.Application(client_max_size=MAX_REQUEST)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        if options.socket is not None:
            await web.UnixSite(self._runner, options.socket, backlog=4096).start()
            self.url = f"unix:{options.socket}"
        else:
            await web.TCPSite(self._runner, "127.0.0.1", options.port, backlog=4096).start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def statistics(self) -> EndpointStatistics:
        """Counts so far."""
        server = self._runner.server if self._runner is not None else None
        return EndpointStatistics(**self._counts, connections=len(server.connections) if server is not None else 0)

    async def idle(self) -> None:
        """Wait until no call is being answered; a call whose client has gone counts no longer."""
        await self._idle.wait()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        index = self._counts["requests"]
        self._counts["requests"] += 1
        self._counts["active"] += 1
        self._idle.clear()
        try:
            asked = orjson.loads(await request.read())
            scripted = self._script(asked, index) if self._script is not None else None
            if scripted is not None:
                return web.Response(body=scripted.body, status=scripted.status, headers=scripted.headers)
            return await self._fault() or await self._answer(request, asked)
        finally:
            self._counts["active"] -= 1
            if not self._counts["active"]:
                self._idle.set()

    async def _fault(self) -> web.Response | None:
        options = self._options
        draw = self._random.random()
        if (draw := draw - options.fail_rate) < 0:
            return self._failure()
        if (draw := draw - options.hang_rate) < 0:
            self._counts["hung"] += 1
            await asyncio.get_running_loop().create_future()  # ends with the client: handlers are cancelled then
        if draw - options.malformed_rate < 0:
            self._counts["malformed"] += 1
            return web.Response(body=_NONSENSE[self._counts["malformed"] % len(_NONSENSE)])
        return None

    def _failure(self) -> web.Response:
        self._counts["failed"] += 1
        if self._counts["failed"] % 2:
            return web.json_response({"error": {"message": "internal error"}}, status=500)
        headers = {"Retry-After": f"{self._options.retry_after_s:g}"}
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers=headers)

    async def _answer(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        arrived = time.time()
        messages = asked["messages"]
        key = digest(messages)
        found = _TEXT if self._answers is None else self._answers.get(key)
        if found is None:
            message = f"no recorded answer to this conversation (digest {key}); write one with bench.answers"
            return web.json_response({"error": {"message": message}}, status=400)
        delay = self._options.latency_s + self._options.jitter_s * self._random.uniform(-1, 1)
        if delay > 0:
            await asyncio.sleep(delay)
        response = web.Response(body=_completion(found, messages, key, asked.get("model", "fake")))
        response.content_type = "application/json"
        await response.prepare(request)
        await response.write_eof()
        self._counts["answered"] += 1
        if self._log >= 0:
            turns = sum(message["role"] == "assistant" for message in messages)
            line = {"t": time.time(), "digest": key, "n": turns, "seed": asked.get("seed"), "asked": arrived}
            os.write(self._log, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return response


def _completion(found: Answer, messages: list[dict[str, Any]], key: str, model: str) -> bytes:
    prompt = sum(len(str(message.get("content") or "")) for message in messages) // 4 + len(messages)
    answered = len(found.message) // 4
    return orjson.dumps(
        {
            "id": f"chatcmpl-{key}",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "message": orjson.Fragment(found.message), "finish_reason": found.finish_reason}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": answered,
                "total_tokens": prompt + answered,
            },
        }
    )

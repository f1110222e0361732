"""Boxes on a server, over HTTP: which routes they use, what they believe, and how each failure is told.

The servers here answer from a script, so that every failure can be had; the real ones have their own tests.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from backends.agentscope import AsyncBFCLSandbox, AsyncTrainingSandbox, BFCLSandbox
from orchestrator.errors import SandboxError, Unavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

CREATED = {"state": [{"role": "user", "content": "hello"}], "info": {"instance_id": "i1", "task_id": "t"}}
STEPPED = {"state": [{"role": "user", "content": "ok", "tool_calls": []}], "reward": 0, "is_terminated": False}
SERVICE = {
    "get_env_profile": (200, {"success": True, "data": ["a", "b"]}),
    "create": (200, {"success": True, "data": CREATED}),
    "step": (200, {"success": True, "data": STEPPED}),
    "evaluate": (200, {"success": True, "data": 1.0}),
    "get_info": (200, {"success": True, "data": "Available tools:"}),
    "release": (200, {"success": True, "data": None}),
}


class Script:
    """A server that answers each route as told, and remembers what it was asked."""

    def __init__(self, answers: Mapping[str, tuple[int, Any]]) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: Mapping[str, str] = {}
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        route = request.match_info["route"]
        self.headers = request.headers
        self.asked.append((route, await request.json()))
        status, body = self.answers.get(route, (404, {"detail": "Not Found"}))
        if callable(body):
            body = body(self.asked[-1][1])
        if isinstance(body, float):
            await asyncio.sleep(body)
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = {"Retry-After": "7"} if status in (429, 503) else {}
        return web.Response(status=status, body=raw, headers=headers)

    def routes(self) -> list[str]:
        return [route for route, _ in self.asked]


@asynccontextmanager
async def server(answers: Mapping[str, tuple[int, Any]]) -> AsyncIterator[Script]:
    script = Script(answers)
    application = web.Application()
    application.router.add_post("/{route}", script.answer)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        script.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        yield script
    finally:
        await runner.cleanup()


async def test_an_environment_service() -> None:
    async with server(SERVICE) as script:
        async with AsyncBFCLSandbox(base_url=script.url, bearer_token="secret") as box:
            assert await box.get_env_profile(env_type="bfcl", split="val") == ["a", "b"]
            created = await box.create_instance(env_type="bfcl", task_id="a", params={"x": 1})
            assert created == CREATED
            assert await box.step("i1", "hi", params={"sparse": True}) == STEPPED
            assert await box.evaluate("i1", params={"sparse": True}) == 1.0
            assert await box.get_info("i1") == "Available tools:"
            assert (await box.get_info())["url"] == script.url.rstrip("/")
            assert await box.release_instance("i1") is True
        assert script.headers["Authorization"] == "Bearer secret"
        bodies = dict(script.asked)
        assert bodies["get_env_profile"] == {
            "env_type": "bfcl",
            "task_id": None,
            "instance_id": None,
            "messages": {},
            "params": {"split": "val"},
        }
        assert bodies["create"]["params"] == {"x": 1}
        assert bodies["step"]["messages"] == {"role": "assistant", "content": "hi"}
        assert bodies["step"]["params"] == {"sparse": True}
        assert script.routes()[0] == "create_from_pool"  # asked once whether there is a manager


async def test_what_was_not_released_is_released_with_the_box() -> None:
    async with server(SERVICE) as script:
        async with AsyncBFCLSandbox(base_url=script.url) as box:
            await box.create_instance(task_id="a", instance_id="mine")
            script.answers["create"] = (500, {"detail": "Traceback (most recent call last):\n  File x\nKeyError: 'y'"})
            with pytest.raises(SandboxError, match=r"KeyError: 'y'$"):
                await box.create_instance(task_id="a", instance_id="unknown")
            script.answers["create"] = (409, {"detail": "taken"})
            for name in ("mine", "theirs"):
                with pytest.raises(UsageError, match="taken"):
                    await box.create_instance(task_id="a", instance_id=name)
        released = {body["instance_id"] for route, body in script.asked if route == "release"}
        assert released == {"mine", "unknown"}  # whether the second was made is not known


def _manager(arguments: Mapping[str, Any]) -> dict[str, Any]:
    answers = {"create_instance": CREATED, "step": STEPPED, "evaluate": 0.0, "release_instance": True}
    return {"data": answers.get(arguments["tool_name"])}


MANAGER = {
    "create_from_pool": (200, {"data": "box-1"}),
    "call_tool": (200, _manager),
    "get_info": (200, {"data": {"container_name": "box-1", "state": "running"}}),
    "release": (200, {"data": True}),
}


async def test_a_sandbox_manager() -> None:
    async with server(MANAGER) as script:
        async with AsyncBFCLSandbox(base_url=script.url) as box:
            assert await box.sandbox_id() == "box-1"
            assert (await box.create_instance("bfcl", "a"))["info"]["instance_id"] == "i1"
            assert await box.step("i1", {"role": "assistant", "content": "x"}) == STEPPED
            assert await box.evaluate("i1") == 0.0
            assert (await box.get_info())["state"] == "running"
            with pytest.raises(SandboxError, match="None"):
                await box.get_env_profile("bfcl")
        calls = [body for route, body in script.asked if route == "call_tool"]
        assert {call["identity"] for call in calls} == {"box-1"}
        assert calls[1] == {
            "identity": "box-1",
            "tool_name": "step",
            "arguments": {"instance_id": "i1", "action": {"role": "assistant", "content": "x"}, "params": {}},
        }
        assert script.asked[-1] == ("release", {"identity": "box-1"})
        assert script.routes().count("create_from_pool") == 1


async def test_a_sandbox_that_was_there_before_is_left_there() -> None:
    async with server(MANAGER) as script:
        async with AsyncBFCLSandbox("theirs", base_url=script.url) as box:
            await box.create_instance("bfcl", "a", "mine")
        assert "release" not in script.routes()
        assert "create_from_pool" not in script.routes()
        assert script.asked[-1][1]["tool_name"] == "release_instance"


async def test_a_manager_with_nothing_free() -> None:
    async with server({"create_from_pool": (200, {"data": None})}) as script:
        with pytest.raises(Unavailable, match="free"):
            await AsyncBFCLSandbox(base_url=script.url).start()


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (400, {"detail": "Instance i1 not found!"}, UsageError, "Instance i1 not found!"),
        (401, {"detail": "Authentication required"}, UsageError, "bearer_token"),
        (404, {"detail": "instance i1 does not exist"}, UsageError, "does not exist"),
        (409, {"detail": "taken"}, UsageError, "taken"),
        (422, {"detail": [{"loc": ["body"]}]}, UsageError, "body"),
        (429, {"detail": "too many"}, Unavailable, "too many; try again in 7 s"),
        (503, b"", Unavailable, "503; try again in 7 s"),
        (500, {"detail": "Error in call_tool: HTTP Error 400: Instance i1 not found!"}, UsageError, "not found"),
        (
            500,
            {"detail": "\x1b[36mray::X\x1b[39m\nTraceback\n  a line\nValueError: no"},
            SandboxError,
            "ValueError: no$",
        ),
        (502, b"<html>", SandboxError, "502"),
        (200, b"<html>", SandboxError, "not a JSON object"),
        (200, {"success": True, "data": "Error: HTTP 500"}, SandboxError, "answered evaluate with Error"),
        (200, {"success": True, "data": {"valid": False, "error": "Evaluation failed: x"}}, SandboxError, "failed: x"),
    ],
)
async def test_every_failure_is_raised(status: int, body: Any, error: type[Exception], words: str) -> None:
    async with server({**SERVICE, "evaluate": (status, body)}) as script:
        async with AsyncBFCLSandbox(base_url=script.url) as box:
            with pytest.raises(error, match=words):
                await box.evaluate("i1")
        assert script.routes().count("evaluate") == 1  # nothing is sent twice


async def test_a_server_that_does_not_answer() -> None:
    async with server({**SERVICE, "step": (200, 5.0)}) as script:
        box = AsyncTrainingSandbox(base_url=script.url, timeout=0.3)
        with pytest.raises(SandboxError, match=r"0\.3 s"):
            await box.step("i1", "hi")
        await box.close()


async def test_a_server_that_is_not_there() -> None:
    async with server(SERVICE) as script:
        url = script.url
    box = AsyncTrainingSandbox(base_url=url)
    with pytest.raises(SandboxError, match="cannot be reached"):
        await box.get_env_profile("appworld")
    await box.close()
    with pytest.raises(UsageError, match="http://"):
        await AsyncTrainingSandbox(base_url="localhost:8000").start()


async def test_the_blocking_form_on_a_server() -> None:
    async with server(SERVICE) as script:

        def play() -> Any:
            with BFCLSandbox(base_url=script.url) as box:
                instance = box.create_instance("bfcl", box.get_env_profile("bfcl")[0])["info"]["instance_id"]
                box.step(instance, "hi")
                return box.evaluate(instance)

        assert await asyncio.to_thread(play) == 1.0
        assert script.routes()[-1] == "release"

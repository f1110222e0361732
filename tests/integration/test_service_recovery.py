"""A service whose sandboxes cannot be had for a while."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from serving import client, say

from backends.sandboxes.local import LocalBackend
from orchestrator.errors import SandboxError
from orchestrator.service import Service, ServiceLimits
from orchestrator.testing.leaks import processes
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from backends.sandboxes.link import LinkedSandbox

REFUSED = SandboxError(Failure(FailureKind.SANDBOX_START, "start", "no machine has room"))


class Intermittent(LocalBackend):
    """Starts nothing while `trouble` is set, and not before `starts` is."""

    trouble: Exception | None = None
    starts: asyncio.Event | None = None

    async def create(self) -> LinkedSandbox:
        if self.starts is not None:
            await self.starts.wait()
        if self.trouble is not None:
            raise self.trouble
        return await super().create()


def kill_sandboxes() -> None:
    for one in processes():
        if "--environment toy" in one.command and one.parent == os.getpid():
            os.kill(one.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(REFUSED, "no machine has room"), (RuntimeError("a defect"), "the sandboxes of toy ended by a defect")],
)
async def test_it_recovers_by_itself_and_its_health_tells_the_truth(
    trouble: Exception, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = ServiceLimits(step_s=5.0, wait_s=10.0)
    async with Service({"toy": lambda: Intermittent("toy")}, port=0, limits=limits) as made, client(made) as http:
        await http.done("create", task_id="toy_6", instance_id="a")
        await http.done("step", instance_id="a", messages=say("add 3"))
        monkeypatch.setattr(Intermittent, "trouble", trouble)
        kill_sandboxes()
        async with asyncio.timeout(10):
            while made.health()["sandboxes"]["toy"]:  # noqa: ASYNC110  # nobody calls: the backend is given up untold
                await asyncio.sleep(0.05)
        async with http.http.get(f"{made.url}/healthz") as response:
            assert (response.status, "Retry-After" in response.headers) == (503, True)
        status, answer = await http.post("step", instance_id="a", messages=say("add 4"))
        assert (status, answer) == (503, {"detail": "the sandboxes of toy are being started"})
        assert said in caplog.text
        monkeypatch.setattr(Intermittent, "trouble", None)
        async with asyncio.timeout(10):
            while made.health()["status"] != "healthy":  # noqa: ASYNC110  # nobody calls here either
                await asyncio.sleep(0.05)
        await http.done("step", instance_id="a", messages=say("add 4"))
        assert await http.done("evaluate", instance_id="a") == 1.0


async def test_a_call_waits_a_bounded_time_for_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ServiceLimits(step_s=5.0, wait_s=0.3)
    async with Service({"toy": lambda: Intermittent("toy")}, port=0, limits=limits) as made, client(made) as http:
        await http.done("create", task_id="toy_6", instance_id="a")
        monkeypatch.setattr(Intermittent, "starts", asyncio.Event())
        kill_sandboxes()
        async with asyncio.timeout(4):
            while made.health()["sandboxes"]["toy"]["live"]:  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.01)
            status, answer = await http.post("create", task_id="toy_6")
        assert (status, answer) == (503, {"detail": "no sandbox of toy was free within 0.3 s"})
        assert Intermittent.starts is not None
        Intermittent.starts.set()
        async with asyncio.timeout(10):
            while made.health()["status"] != "healthy":  # noqa: ASYNC110  # it signals nothing
                await asyncio.sleep(0.05)
        assert (await http.done("step", instance_id="a", messages=say("add 1")))["state"][0]["content"] == "total 1"

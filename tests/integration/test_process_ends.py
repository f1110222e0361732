"""Isolation `process`: a session's death is its own, is told truthfully, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import pytest
from forked import alive, gone, number, told

from backends.sandboxes import local
from backends.sandboxes.local import LocalBackend
from orchestrator.errors import SandboxError, SandboxRefused
from orchestrator.testing.harness import RUN, loses, refused, say, spec
from orchestrator.testing.leaks import children
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from backends.sandboxes.link import LinkedSandbox

TASK = "toy_3"
LIMIT_S = 0.5


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"))


@pytest.fixture(autouse=True)
def _brought(request: pytest.FixtureRequest, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tmp_path" not in request.fixturenames:  # who has a folder lays out one of its own
        forked.bring(site, monkeypatch)


@asynccontextmanager
async def one(**options: Any) -> AsyncIterator[LinkedSandbox]:
    async with LocalBackend("forked", **options) as backend:
        yield await backend.create()


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ("crash", FailureKind.SANDBOX_LOST, "exited with code 9"),
        ("abort", FailureKind.SANDBOX_LOST, "SIGABRT"),
        ("garble", FailureKind.SANDBOX_LOST, "broke its protocol"),
        ("close", FailureKind.SANDBOX_LOST, "closed its stream"),
        ("leave 0.1", FailureKind.SANDBOX_LOST, "SIGKILL"),
        ("hang", FailureKind.SANDBOX_HUNG, "longer than 0.5 s"),
        ("spin", FailureKind.SANDBOX_HUNG, "longer than 0.5 s"),
        ("sleep 3600", FailureKind.SANDBOX_HUNG, "longer than 0.5 s"),
    ],
)
async def test_a_death_is_its_own_sessions_loss(words: str, kind: FailureKind, says: str) -> None:
    async with one() as sandbox:
        guilty, _ = await sandbox.open(spec(TASK, step_timeout_s=LIMIT_S))
        other, _ = await sandbox.open(spec(TASK))
        pid = await number(guilty, "me")
        dying = asyncio.create_task(_until_it_dies(guilty, words), name="dying")
        for turn in range(20):
            assert await told(other, "add 1") == f"total {turn + 1}"
        lost = await loses(dying, words)
        assert lost.suspect
        assert (lost.failure.kind, lost.failure.stage) == (kind, "step")
        assert says in lost.failure.message
        await gone(pid)
        assert (await loses(guilty.step(say("add 1")), "a step after the death")).failure.kind is not None
        guilty.close()
        assert await told(other, "add 1") == "total 21"
        assert not sandbox.lost.done()
        await (await sandbox.open(spec(TASK)))[0].step(say("add 1"))


async def _until_it_dies(session: Any, words: str) -> None:
    await session.step(say(words))
    while True:
        await session.step(say("sleep 0.01"))


async def test_kill_in_the_middle_of_a_step() -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        pid = await number(session, "me")
        sleeping = asyncio.create_task(session.step(say("sleep 3600")), name="sleeping")
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        lost = await loses(sleeping, "a killed process")
        assert "SIGKILL" in lost.failure.message
        assert lost.suspect
        assert not sandbox.lost.done()


async def test_what_dies_between_two_steps_is_its_own_doing() -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        pid = await number(session, "me")
        assert await told(session, "bomb 0.05") == "armed"
        await gone(pid)
        lost = await loses(session.step(say("add 1")), "a step after the bomb")
        assert lost.suspect
        assert "code 5" in lost.failure.message


@pytest.mark.parametrize("end", ["close", "crash", "hang"])
async def test_what_a_session_leaves_behind_ends_with_it(end: str) -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK, step_timeout_s=LIMIT_S))
        other, _ = await sandbox.open(spec(TASK))
        hidden, child, me = [await number(session, words) for words in ("daemon", "children", "me")]
        others = await number(other, "daemon")
        assert all(alive(pid) for pid in (hidden, child, me, others))
        if end != "close":
            await loses(session.step(say(end)), end)
        session.close()
        await gone(hidden, child, me)
        assert alive(others)


@pytest.mark.parametrize(
    ("task", "kind"), [("open_crash", FailureKind.SANDBOX_LOST), ("open_hang", FailureKind.SANDBOX_HUNG)]
)
async def test_a_death_at_the_opening(task: str, kind: FailureKind) -> None:
    async with one() as sandbox:
        lost = await loses(sandbox.open(spec(task, step_timeout_s=LIMIT_S)), task)
        assert lost.suspect
        assert (lost.failure.kind, lost.failure.stage) == (kind, "open")
        error = await refused(sandbox.open(spec("open_error")), "an opening that raises")
        assert error.failure.kind is FailureKind.ENVIRONMENT
        await sandbox.open(spec(TASK))
        assert sandbox.statistics().sessions == 1


async def test_memory_is_bounded_for_each_session() -> None:
    async with one(memory_mb=512) as sandbox:
        sessions = [(await sandbox.open(spec(TASK)))[0] for _ in range(3)]
        for session in sessions:
            assert await told(session, "memory 300") == "allocated"
        with pytest.raises(SandboxRefused, match="MemoryError"):
            await sessions[0].step(say("memory 300"))
        assert await told(sessions[0], "add 1") == "total 1"
        assert (await told(sessions[0], "state")).split()[:2] == ["1000", "512"]


async def test_no_more_children_than_allowed() -> None:
    async with one(max_children=2) as sandbox:
        first, _ = await sandbox.open(spec(TASK))
        await sandbox.open(spec(TASK))
        error = await refused(sandbox.open(spec(TASK)), "one more than allowed")
        assert error.code == "busy"
        assert error.failure.retryable
        waiting = asyncio.create_task(sandbox.open(spec(TASK)), name="waiting")
        await asyncio.sleep(0.05)
        first.close()
        assert await told((await waiting)[0], "global") == "1"


async def test_closing_in_the_middle() -> None:
    """Of an opening, of a step, and again and again: no child outlives its session."""
    async with one(max_children=4) as sandbox:
        for delay in [0.0, 0.001, 0.002, 0.004, 0.008, 0.016] * 3:
            opening = asyncio.create_task(sandbox.open(spec(TASK)), name="opening")
            await asyncio.sleep(delay)
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled():
                opening.result()[0].close()
            session, _ = await sandbox.open(spec(TASK))
            pid = await number(session, "me")
            stepping = asyncio.create_task(session.step(say("sleep 3600")), name="stepping")
            await asyncio.sleep(delay)
            stepping.cancel()
            session.close()
            await gone(pid)


def _zygote(server: int) -> int:
    (zygote,) = [child.pid for child in children(server)]
    return zygote


@pytest.mark.parametrize("victim", ["server", "zygote", "both"])
async def test_nothing_outlives_the_server(victim: str) -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        hidden, child, me = [await number(session, words) for words in ("daemon", "children", "me")]
        zygote = _zygote(sandbox.pid)
        sleeping = asyncio.create_task(session.step(say("sleep 3600")), name="sleeping")
        await asyncio.sleep(0.05)
        for pid in {"server": [sandbox.pid], "zygote": [zygote], "both": [sandbox.pid, zygote]}[victim]:
            os.kill(pid, signal.SIGKILL)
        lost = await loses(sleeping, "a sandbox's end")
        assert lost.suspect
        assert ("code 70" if victim == "zygote" else "SIGKILL") in lost.failure.message
        await gone(sandbox.pid, zygote, me, *(() if victim == "both" else (hidden, child)))
        for pid in (hidden, child):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


async def test_nothing_is_left_when_destroy_returns() -> None:
    async with LocalBackend("forked") as backend:
        backend.configure(run=RUN, with_solutions=False, logs=None, call_limit_s=2.0)
        sandbox = await backend.create()
        assert list(await backend.owned_by(RUN)) == [sandbox.id]
        session, _ = await sandbox.open(spec(TASK))
        hidden = await number(session, "daemon")
        assert list(await backend.owned_by(RUN)) == [sandbox.id]
        await backend.destroy(sandbox.id)
        assert not alive(hidden)
        assert not await backend.owned_by(RUN)
        assert backend.cpu_seconds() > 0.0


async def test_a_zygote_that_hangs_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "TAIL_S", 0.2)
    async with LocalBackend("forked") as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec(TASK))
        zygote, me = _zygote(sandbox.pid), await number(session, "me")
        os.kill(zygote, signal.SIGSTOP)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(backend.destroy(sandbox.id), name="destroy")
        await gone(zygote, me)


@pytest.mark.parametrize(
    ("preload", "says"),
    [
        ("raise ValueError('there is no data')", "cannot be loaded: ValueError: there is no data"),
        ("threading.Timer(9, print).start()", "RuntimeError: preload left threads running"),
        ("os._exit(3)", "the zygote ended"),
    ],
)
async def test_a_preload_that_fails(preload: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(forked.lay_out(tmp_path / "site", preload), monkeypatch)
    async with LocalBackend("forked") as backend:
        backend.configure(run=RUN, with_solutions=False, logs=str(tmp_path), call_limit_s=2.0)
        with pytest.raises(SandboxError, match="while starting") as raised:
            await backend.create()
        assert raised.value.failure.kind is FailureKind.SANDBOX_START
        (log,) = await asyncio.to_thread(lambda: list(tmp_path.glob("*.log")))
        assert says in log.read_text(encoding="utf-8")


async def test_another_isolation_than_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = forked.lay_out(tmp_path / "site")
    declared = site / "forked_package" / "forked" / "environment.toml"
    declared.write_text(declared.read_text(encoding="utf-8").replace('"process"', '"shared"'), encoding="utf-8")
    forked.bring(site, monkeypatch)
    async with LocalBackend("forked") as backend:
        with pytest.raises(SandboxError, match="code 1 while starting"):
            await backend.create()


async def test_code_that_would_be_graded_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = forked.lay_out(tmp_path / "site", runs_code=True)
    inside = site / "forked_package" / "forked" / "inside.py"
    inside.write_text(inside.read_text(encoding="utf-8").replace("def grade(", "def other("), encoding="utf-8")
    forked.bring(site, monkeypatch)
    async with LocalBackend("forked", unsafe=True) as backend:
        backend.configure(run=RUN, with_solutions=False, logs=str(tmp_path), call_limit_s=2.0)
        with pytest.raises(SandboxError, match="code 1 while starting"):
            await backend.create()
        (log,) = await asyncio.to_thread(lambda: list(tmp_path.glob("*.log")))
        assert "give it a `grade`" in log.read_text(encoding="utf-8")


async def test_no_folder_can_be_made() -> None:
    async with LocalBackend("forked") as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec(TASK))
        base = Path(await told(session, "home")).parent
        await asyncio.to_thread(base.rename, base.with_name("away"))
        for _ in range(2):
            error = await refused(sandbox.open(spec(TASK)), "a session without a folder")
            assert (error.failure.kind, error.failure.retryable) == (FailureKind.SANDBOX_START, True)
            assert "no disk" in error.failure.message
        assert await told(session, "add 1") == "total 1"
        await asyncio.to_thread(base.with_name("away").rename, base)
        await sandbox.open(spec(TASK))


async def test_what_an_agent_leaves_does_not_keep_a_backend_from_its_end() -> None:
    """Folders deeper than Python's stack, in a sandbox that is ended before they could be removed."""
    dig = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')"
    async with LocalBackend("forked") as backend:
        sandbox = await backend.create()
        session, _ = await sandbox.open(spec(TASK))
        home = Path(await told(session, "home"))
        assert await told(session, f'shell python3 -c "{dig}"') == ""
        os.kill(_zygote(sandbox.pid), signal.SIGKILL)
        await backend.destroy(sandbox.id)
        assert not home.parents[1].exists()
        assert not list(home.parents[2].glob(".*"))

"""Isolation `process`: what a session's child cannot reach, and that it is graded where it never was."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from errno import EACCES, ENOENT, EPERM, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import orjson
import pytest
from forked import number, told

from backends.sandboxes.docker import DockerBackend
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.local import LocalBackend
from backends.server import confine
from orchestrator.testing.harness import loses, refused, say, spec
from orchestrator.testing.leaks import children
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from backends.sandboxes.link import LinkedSandbox

TASK = "toy_3"
TOKEN = "a token that no other process should know"
LANDLOCK = pytest.mark.skipif(confine.version() < 6, reason="this kernel's Landlock is older than ABI 6")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.lay_out(tmp_path_factory.mktemp("forked"))


@pytest.fixture(autouse=True)
def _brought(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.bring(site, monkeypatch)


@asynccontextmanager
async def one(backend: Any = None) -> AsyncIterator[LinkedSandbox]:
    async with backend or LocalBackend("forked") as entered:
        yield await entered.create()


async def _cannot_reach_anything(sandbox: LinkedSandbox) -> None:
    """In a process or a container: the secret by any name, and other processes."""
    session, _ = await sandbox.open(spec(TASK))
    other, _ = await sandbox.open(spec(TASK))
    where, sibling = await told(session, "where"), await number(other, "me")
    for path in (where, f"/proc/self/root{where}", f"/proc/{await number(session, 'me')}/root{where}"):
        assert await told(session, f"read {path}") == f"refused {EACCES}"
    assert await told(session, "write ~") in {f"refused {EACCES}", f"refused {EROFS}"}
    for somebody in ("up", "top", sibling):
        assert await told(session, f"signal {somebody}") == f"refused {EPERM}"
        assert await told(session, f"memory_of {somebody}") in {f"refused {EACCES}", f"refused {EPERM}"}
    assert await told(other, "add 1") == "total 1"
    assert await told(session, f"read {where.removesuffix('answers/truth.json')}environment.toml") != ""
    code, own, beside = (
        where.removesuffix("/answers/truth.json"),
        await told(session, "home"),
        await told(other, "home"),
    )
    assert own != beside
    above = [str(path) for path in Path(own).parents[:2]]
    for place in (code, *above, beside, "/tmp", "/var/tmp", "/proc/self"):
        assert await told(session, f"write {place}/mine") in {f"refused {number}" for number in (EACCES, EROFS, ENOENT)}
    assert await told(session, f"write {own}/mine") == "written"
    *standard, stream = (await told(session, "files")).split()
    assert [entry.partition(":")[0] for entry in standard] == ["0", "1", "2"]
    assert stream.endswith(":socket")


@LANDLOCK
async def test_what_a_session_cannot_reach() -> None:
    async with one() as sandbox:
        await _cannot_reach_anything(sandbox)


@LANDLOCK
@pytest.mark.usefixtures("containers")
async def test_what_a_session_cannot_reach_in_a_container() -> None:
    async with one(DockerBackend("forked")) as sandbox:
        await _cannot_reach_anything(sandbox)


@LANDLOCK
@pytest.mark.parametrize(
    "words",
    [
        "cat ~",
        "cp ~ $TMPDIR/mine && cat $TMPDIR/mine",
        "ln ~ $TMPDIR/mine && cat $TMPDIR/mine",
        "ln -s ~ $TMPDIR/mine && cat $TMPDIR/mine",
        "mv ~ $TMPDIR/mine && cat $TMPDIR/mine",
        "mv $(dirname ~) $TMPDIR/mine && cat $TMPDIR/mine/truth.json",
        "unshare -rm cat ~",
        "setsid cat ~",
        "rm ~",
        ": > ~",
        "echo more >> ~",
    ],
)
async def test_what_a_session_starts_is_held_too(words: str) -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        assert "worth" not in await told(session, f"shell {words}")
        assert (await session.evaluate()).reward == 0.5**4, "the secret is as it was"


@LANDLOCK
async def test_all_else_is_as_before() -> None:
    words = "cd $TMPDIR; mkdir a b; echo one > a/x; mv a/x b/y; ln b/y a/z; cat a/z; rm -r a b; ls / | grep tmp"
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        assert (await told(session, f"shell {words}")).split() == ["one", "tmp"]
        child = await number(session, "children")
        assert await told(session, f"signal {child}") == "killed", "its own it may end"


@LANDLOCK
async def test_what_graders_and_later_sessions_read_stays_as_it_is() -> None:
    """Code of the environment's, and what the process that all are forked from has left in its folder."""
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        code = Path(await told(session, "where")).parents[1]
        before = sorted(path.name for path in code.iterdir())
        for words in (
            f"echo 'raise SystemExit' > {code}/inside.py",
            f"echo more >> {code}/inside.py",
            f"mv {code}/inside.py {code}/other.py",
            f"rm {code}/inside.py",
            f"mv {code} {code}-gone",
            f"ln -s / {code}/link",
            f"mkdir {code}/folder",
            f"truncate -s 0 {code}/inside.py",
            f"cp {code}/inside.py . && mv inside.py {code}/inside.py",
            "touch ../../mine; mv ../../sessions ../../other",
        ):
            await told(session, f"shell {words}")
            assert sorted(path.name for path in code.iterdir()) == before, words
            assert "class Forked" in (code / "inside.py").read_text(encoding="utf-8"), words
        assert await told((await sandbox.open(spec(TASK)))[0], "add 1") == "total 1"


async def test_a_folder_is_one_session_s_own_and_gone_with_it() -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        own = Path(await told(session, "home"))
        assert (await told(session, "shell pwd; echo $TMPDIR; ls -A")).split() == [str(own)] * 2
        deep = "for n in $(seq 300); do mkdir -p a/b c; mv a c/; mv c a; done; mkdir -p shut/in; chmod 0 shut/in shut"
        assert not await told(session, f"shell {deep}; ln -s / root")
        daemon = await number(session, "daemon")
        session.close()
        await forked.gone(daemon)
        await _removed(own)
        again, _ = await sandbox.open(spec(TASK))
        assert await told(again, "home") == str(own), "the lowest number that is free"
        assert not await told(again, "shell ls -A")


async def _removed(folder: Path) -> None:
    async with asyncio.timeout(forked.GONE_S):
        while await asyncio.to_thread(lambda: any(folder.parent.iterdir())):  # noqa: ASYNC110  # see forked.gone
            await asyncio.sleep(0.01)


async def test_it_is_graded_elsewhere() -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        for total in range(1, 5):
            assert await told(session, "add 1") == f"total {total}"
            grade = await session.evaluate({"simple": True})
            assert grade.reward == 0.5 ** (4 - total)
            assert orjson.loads(grade.details) == {"total": total, "target": 4, "params": {"simple": True}}
        assert await told(session, "forge") == "forged"
        assert (await session.evaluate()).reward == 0.0


async def test_a_grading_that_fails() -> None:
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        await session.step(say("badgrade"))
        error = await refused(session.evaluate(), "a grading that raises")
        assert error.failure.kind is FailureKind.ENVIRONMENT
        assert await told(session, "add 1") == "total 1"


async def test_a_grading_that_dies_or_hangs() -> None:
    async with one() as sandbox:
        dying, _ = await sandbox.open(spec("grade_dies"))
        lost = await loses(dying.evaluate(), "a grading that dies")
        assert lost.suspect
        assert (lost.failure.kind, lost.failure.stage) == (FailureKind.SANDBOX_LOST, "evaluate")
        assert "SIGABRT" in lost.failure.message
        assert await told(dying, "add 1") == "total 1"
        hanging, _ = await sandbox.open(spec("grade_hangs", step_timeout_s=0.3))
        lost = await loses(hanging.evaluate(), "a grading that hangs")
        assert (lost.failure.kind, lost.failure.stage) == (FailureKind.SANDBOX_HUNG, "evaluate")
        assert not sandbox.lost.done()


@pytest.mark.usefixtures("containers")
async def test_out_of_memory_in_a_container() -> None:
    """The kernel kills the session that asks for it, not the server."""
    async with one(DockerBackend("forked", hardening=Hardening(memory_mb=256))) as sandbox:
        greedy, _ = await sandbox.open(spec(TASK))
        other, _ = await sandbox.open(spec(TASK))
        lost = await loses(greedy.step(say("memory 400")), "a session out of memory")
        assert "SIGKILL" in lost.failure.message
        assert lost.suspect
        assert await told(other, "add 1") == "total 1"
        assert not sandbox.lost.done()


async def test_sixteen_at_once_are_light() -> None:
    loop = asyncio.get_running_loop()
    async with one() as sandbox:
        times, sessions = [], []
        for _ in range(16):
            began = loop.time()
            sessions.append((await sandbox.open(spec(TASK)))[0])
            times.append(loop.time() - began)
        pids = [await number(session, "me") for session in sessions]
        assert len(set(pids)) == 16
        assert sorted(times)[8] < 0.1, "20 ms on a machine of its own"
        assert [await told(session, "global") for session in sessions] == ["1"] * 16
        private = [await asyncio.to_thread(_private_kib, pid) for pid in pids]
        assert max(private) < 6 * 1024, private


async def test_the_servers_token_is_in_no_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_urlsafe", lambda size: TOKEN)
    async with one() as sandbox:
        session, _ = await sandbox.open(spec(TASK))
        (zygote,) = await asyncio.to_thread(children, sandbox.pid)
        pids = sandbox.pid, zygote.pid, await number(session, "me")
        server, *others = [await asyncio.to_thread(_holds, pid, TOKEN.encode()) for pid in pids]
        assert server
        assert others == [False, False]


def _holds(pid: int, what: bytes) -> bool:
    """Whether a process has this somewhere in its memory."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for region, mode, *_ in (line.split() for line in maps):
            start, end = (int(address, 16) for address in region.split("-"))
            if mode.startswith("rw"):
                memory.seek(start)
                if what in memory.read(end - start):
                    return True
    return False


def _private_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

"""What runs in the outpost's container, here without one: the sockets it keeps, whom it trusts, and when it ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backends.sandboxes import tls
from backends.sandboxes.docker import outpost_inside
from backends.sandboxes.docker.outpost_inside import SOCKET, Doors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = Path(outpost_inside.__file__).read_text(encoding="utf-8")


@pytest.fixture
def no_blocking() -> None:
    """What is tested has a loop of its own, where it runs: it may make a folder in it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it keeps its sockets."""
    monkeypatch.setattr(outpost_inside, "FOLDER", str(tmp_path))
    return tmp_path


@asynccontextmanager
async def owner(certificate: tls.Certificate | None) -> AsyncIterator[dict[str, Any]]:
    """One that says everything again in capitals until it hears `bye`; what the outpost is told of it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (line := await reader.readline()) not in {b"", b"bye\n"}:
            writer.write(line.upper())
        writer.close()

    context = None if certificate is None else certificate.context
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        yield {"host": "127.0.0.1", "port": port, "certificate": None if certificate is None else certificate.pem}


@pytest.mark.parametrize("insecure", [True, False])
async def test_what_comes_in_goes_to_the_owner(folder: Path, tmp_path: Path, insecure: bool) -> None:
    certificate = None if insecure else await asyncio.to_thread(tls.make, tmp_path)
    async with owner(certificate) as config:
        doors = Doors(config)
        await doors.obey("reach")
        await doors.obey("open s1")
        reader, writer = await asyncio.open_unix_connection(folder / "s1" / SOCKET)
        writer.write(b"let me in\n")
        assert await reader.readline() == b"LET ME IN\n"
        await doors.obey("shut s1")
        assert not (folder / "s1").exists()
        writer.write(b"hello\n" * 50_000)
        assert await reader.readexactly(300_000) == b"HELLO\n" * 50_000
        writer.write(b"bye\n")
        assert await reader.read() == b"", "the owner's end is told"
        writer.close()
        await doors.obey("shut s1")


async def test_another_certificate_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    other = await asyncio.to_thread(tls.make, tmp_path)
    async with owner(await asyncio.to_thread(tls.make, tmp_path)) as config:
        doors = Doors({**config, "certificate": other.pem})
        with pytest.raises(OSError, match="certificate"):
            await doors.obey("reach")
        await doors.obey("open s1")
        reader, writer = await asyncio.open_unix_connection(folder / "s1" / SOCKET)
        assert await reader.read() == b""
        writer.close()
        await doors.obey("shut s1")


async def test_who_may_connect(folder: Path) -> None:
    """Whoever sees the folder; nobody can write to it."""
    doors = Doors({"host": "127.0.0.1", "port": 1, "certificate": None})
    await doors.obey("open s1")
    modes = [path.stat().st_mode & 0o777 for path in (folder / "s1", folder / "s1" / SOCKET)]
    assert modes == [0o711, 0o666]
    with pytest.raises(ValueError, match="what is"):
        await doors.obey("open")
    await doors.obey("shut s1")


def run(lease_s: float, said: bytes | None) -> subprocess.CompletedProcess[bytes]:
    """The program as its container runs it; it hears `said`, and then the end, or nothing for None."""
    letter = json.dumps({"host": "127.0.0.1", "port": 1, "certificate": None, "lease_s": lease_s}).encode() + b"\n"
    command = [sys.executable, "-I", "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(letter + (said or b""))
        process.stdin.flush()
        if said is None:
            process.wait(20)
        out, errors = process.communicate(timeout=20)
        return subprocess.CompletedProcess(command, process.returncode, out, errors)


def test_it_answers_and_ends_with_its_owner() -> None:
    done = run(60.0, b"alive\nreach\nalive\n")
    first, second, third = done.stdout.decode().splitlines()
    assert (first, third, done.returncode) == ("done alive", "done alive", 0)
    assert second.startswith("failed reach: ")
    assert "Connect call failed" in second


def test_it_ends_when_it_has_not_heard_of_its_owner() -> None:
    done = run(0.3, None)
    assert (done.returncode, done.stderr) == (1, b"the owner has not been heard of for 0.3 s\n")

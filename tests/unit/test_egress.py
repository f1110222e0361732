"""Where a container may connect to: the list, what addresses are believed, and the proxy before a real server."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sandboxes.docker import proxy as module
from backends.sandboxes.docker.egress import AllowList, Destination, parse
from backends.sandboxes.docker.proxy import CONNECTIONS, HEAD_BYTES, LOOKUPS, SOCKET, Proxy
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class TestAllowList:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("example.org:443", "example.org", 443),
            ("Example.org.:443", "example.org", 443),
            ("10.0.0.7:1", "10.0.0.7", 1),
            ("[::1]:80", "::1", 80),
            ("[0:0::1]:80", "::1", 80),
        ],
    )
    def test_a_destination(self, text: str, host: str, port: int) -> None:
        assert parse(text) == Destination(host, port)
        assert parse(str(parse(text))) == parse(text)
        assert AllowList.of([text]).names(Destination(host, port))

    @pytest.mark.parametrize(
        "text",
        ["example.org", ":443", "example.org:", "example.org:0", "a.org:65536", "a b:1", "*.org:1", "::1:80", "[x]:1",
         "a@b:1", "a/b:1", "bücher.de:1", "a:²"],
    )  # fmt: skip
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(UsageError, match="egress: "):
            AllowList.of([text])

    @given(st.text())
    def test_whatever_is_asked_for_is_read_or_refused(self, text: str) -> None:
        try:
            assert parse(text).port > 0
        except ValueError:
            return

    def test_only_what_is_listed(self) -> None:
        listed = AllowList.of(["example.org:443", "127.0.0.1:8000"])
        assert listed
        assert not AllowList()
        for other in ("example.org:80", "org:443", "x.example.org:443", "example.org.evil.com:443", "127.0.0.1:8001"):
            assert not listed.names(parse(other))

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1", "10.1.2.3", "172.17.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
         "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:10.0.0.1",
         "64:ff9b::a9fe:a9fe", "2002:7f00:1::1", "::127.0.0.1", "fec0::1", "240.0.0.1", "192.0.0.192", "198.18.0.1",
         "168.63.129.16", "::ffff:168.63.129.16"],
    )  # fmt: skip
    def test_addresses_that_are_nobodys_business(self, address: str) -> None:
        assert not AllowList.of(["example.org:443"]).believes(address, 443)

    def test_addresses_that_are_public_or_listed(self) -> None:
        listed = AllowList.of(["db.internal:5432", "10.1.2.3:5432", "[::1]:80"])
        assert listed.believes("10.1.2.3", 5432)
        assert listed.believes("::1", 80)
        assert not listed.believes("10.1.2.3", 5433)
        assert not listed.believes("10.1.2.4", 5432)
        assert listed.believes("151.101.0.223", 443)
        assert listed.believes("2a04:4e42::223", 443)


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """A server that says what it was sent, until its client stops."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100_000):
            writer.write(b"<" + data + b">")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def proxied(folder: Path, *allowed: str) -> AsyncIterator[Proxy]:
    async with asyncio.TaskGroup() as tasks:
        proxy = Proxy("box", folder / "way-out", AllowList.of(allowed), tasks)
        await proxy.open()
        try:
            yield proxy
        finally:
            await proxy.close()
            assert not await asyncio.to_thread(proxy.folder.exists)


async def ask(proxy: Proxy, *pieces: bytes) -> bytes:
    """All that is answered to a client that sends these, each after an answer to the one before, and then stops."""
    reader, writer = await asyncio.open_unix_connection(str(proxy.folder / SOCKET))
    heard = b""
    for piece in pieces[:-1]:
        writer.write(piece)
        heard += await reader.read(100_000)
    writer.write(pieces[-1])
    writer.write_eof()
    heard += await reader.read()
    writer.close()
    await writer.wait_closed()
    return heard


async def status(proxy: Proxy, request: str) -> int:
    return int((await ask(proxy, request.encode() + b"\r\n\r\n")).split()[1])


class TestProxy:
    async def test_a_tunnel(self, tmp_path: Path) -> None:
        async with echoing() as port, proxied(tmp_path, f"127.0.0.1:{port}") as proxy:
            heard = await ask(proxy, f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), b"hello")
            assert heard.startswith(b"HTTP/1.1 200 ")
            assert heard.endswith(b"\r\n\r\n<hello>")
            assert proxy.refused == 0

    async def test_a_plain_request_arrives_as_at_its_origin(self, tmp_path: Path) -> None:
        async with echoing() as port, proxied(tmp_path, f"127.0.0.1:{port}") as proxy:
            fields = "Host: another\r\nProxy-Authorization: secret\r\nAccept: x\r\n\r\n"
            heard = await ask(proxy, f"GET http://127.0.0.1:{port}/a?b=c#d HTTP/1.1\r\n{fields}".encode())
            own = f"Host: 127.0.0.1:{port}\r\nConnection: close"
            assert heard == f"<GET /a?b=c HTTP/1.1\r\n{own}\r\nAccept: x\r\n\r\n>".encode(), "of no other site there"

    async def test_what_is_refused(self, tmp_path: Path) -> None:
        async with echoing() as port, proxied(tmp_path, f"localhost:{port}", "localhost:1", "127.0.0.1:1") as proxy:
            assert await status(proxy, f"CONNECT 127.0.0.1:{port} HTTP/1.1") == 403, "another name"
            assert await status(proxy, f"CONNECT localhost:{port} HTTP/1.1") == 403, "a name for the host itself"
            assert await status(proxy, f"GET http://localhost:{port}/ HTTP/1.1") == 403
            assert await status(proxy, "CONNECT 169.254.169.254:80 HTTP/1.1") == 403
            assert await status(proxy, "CONNECT localhost:1 HTTP/1.1") == 502, "allowed, and nobody is there"
            for wrong in ("CONNECT localhost HTTP/1.1", "GET / HTTP/1.1", "GET https://a/ HTTP/1.1", "\x00", "a b c d",
                          "GET http://u:p@localhost/ HTTP/1.1", "GET http://[::1/ HTTP/1.1"):  # fmt: skip
                assert await status(proxy, wrong) == 400, wrong
            assert await status(proxy, "GET http://a/ HTTP/1.1\r\nx: " + "y" * HEAD_BYTES) == 431
            assert proxy.refused == 13

    async def test_the_address_that_was_judged_is_the_one_that_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A name that is public when it is looked up, and the host's own a moment later."""
        asked: list[str] = []

        async def connect(addresses: list[str], port: int) -> Any:
            asked.extend(addresses)
            raise OSError("not here")

        def look_up(wanted: Destination) -> list[str]:
            return ["127.0.0.1", "93.184.216.34"]

        async with proxied(tmp_path, "rebind.example:443") as proxy:
            with monkeypatch.context() as patched:
                patched.setattr(module, "_look_up", look_up)
                patched.setattr(module, "_connect", connect)
                assert await status(proxy, "CONNECT rebind.example:443 HTTP/1.1") == 502
        assert asked == ["93.184.216.34"]

    async def test_lookups_that_hang_hold_up_their_own_container_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hang = threading.Event()
        looked: list[Destination] = []

        def look_up(wanted: Destination) -> list[str]:
            looked.append(wanted)
            hang.wait()
            return ["127.0.0.1"]

        monkeypatch.setattr(module, "_look_up", look_up)
        monkeypatch.setattr(module, "REACH_S", 0.1)
        async with proxied(tmp_path, "slow.example:443") as proxy:
            try:
                async with asyncio.TaskGroup() as tasks:
                    many = [tasks.create_task(status(proxy, "CONNECT slow.example:443 HTTP/1.1")) for _ in range(20)]
                assert [one.result() for one in many] == [502] * 20
                assert len(looked) == LOOKUPS
            finally:
                hang.set()

    async def test_connections_are_bounded(self, tmp_path: Path) -> None:
        async with proxied(tmp_path, "localhost:1") as proxy:
            held = [await asyncio.open_unix_connection(str(proxy.folder / SOCKET)) for _ in range(CONNECTIONS)]
            more = await asyncio.open_unix_connection(str(proxy.folder / SOCKET))
            assert (await more[0].read()).startswith(b"HTTP/1.1 503 ")
            for _, writer in (*held, more):
                writer.close()
                await writer.wait_closed()

    async def test_closing_ends_what_goes_on(self, tmp_path: Path) -> None:
        async with echoing() as port:
            async with proxied(tmp_path, f"127.0.0.1:{port}") as proxy:
                reader, writer = await asyncio.open_unix_connection(str(proxy.folder / SOCKET))
                writer.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\n".encode())
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            assert (await reader.read()).strip() == b""
            writer.close()
            await writer.wait_closed()

"""The port that sandboxes of other machines dial in at: who is let in, and whom they trust."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import orjson
import pytest

from backends.sandboxes import listener as module
from backends.sandboxes.listener import Listener, Tcp
from backends.server.trust import trusted
from backends.server.wire import PROTOCOL, Hello
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from aiohttp import web

LOCAL = "127.0.0.1"


class Guest:
    """Whoever has come in."""

    def __init__(self, hello: Hello) -> None:
        self.hello = hello
        self.ended: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()

    async def run(self, socket: web.WebSocketResponse) -> Failure:
        async for _ in socket:
            pass
        return Failure(FailureKind.SANDBOX_LOST, "call", "gone")


def hello(token: str) -> str:
    fields = Hello(PROTOCOL, token, "toy", "0" * 16, "shared", True, False, 10, 1)
    return orjson.dumps(fields._asdict()).decode()


async def dial(url: str, certificate: str | None, said: str) -> aiohttp.WSMessage:
    """Say hello; what comes first after it, within a second."""
    connector = aiohttp.TCPConnector(ssl=trusted(certificate))
    async with aiohttp.ClientSession(connector=connector) as http, http.ws_connect(url) as socket:
        await socket.send_str(said)
        return await socket.receive(timeout=1.0)


async def test_only_who_knows_the_token_comes_in() -> None:
    async with Listener(Tcp(LOCAL)) as listener:
        arrived = listener.expect("the-token", Guest)
        for wrong in (hello("another"), hello(""), "{}", "no json", hello("x" * 5000)):
            assert (await dial(listener.url, listener.certificate, wrong)).type is aiohttp.WSMsgType.CLOSE
            assert not arrived.done()
        with pytest.raises(TimeoutError):  # nothing is said to who has come in
            await dial(listener.url, listener.certificate, hello("the-token"))
        assert (await arrived).hello.token == "the-token"
        again = await dial(listener.url, listener.certificate, hello("the-token"))
        assert again.type is aiohttp.WSMsgType.CLOSE  # a token is good for one


async def test_who_connects_and_does_not_ask_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody on the network can: without a word, or with half a one. Who has come in stays."""
    monkeypatch.setattr(module, "HELLO_S", 0.1)
    async with Listener(Tcp(LOCAL, insecure=True)) as listener, aiohttp.ClientSession() as http:
        arrived = listener.expect("the-token", Guest)
        async with http.ws_connect(listener.url) as guest:
            await guest.send_str(hello("the-token"))
            inside = await arrived
            for said in (b"", b"GET / HTTP/1.1\r\nHost: "):
                reader, writer = await asyncio.open_connection(LOCAL, urlsplit(listener.url).port)
                writer.write(said)
                async with asyncio.timeout(5.0):
                    assert await reader.read() == b""
                writer.close()
            assert not inside.ended.done()


async def test_a_client_trusts_this_listener_and_no_other() -> None:
    async with Listener(Tcp(LOCAL)) as one, Listener(Tcp(LOCAL)) as other:
        assert one.url.startswith("https://")
        assert one.certificate != other.certificate
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await dial(one.url, other.certificate, hello("x"))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await dial(one.url, None, hello("x"))


async def test_without_tls_it_says_so_in_its_address() -> None:
    async with Listener(Tcp(LOCAL, insecure=True)) as listener:
        assert (listener.url.startswith("http://"), listener.certificate) == (True, None)
        arrived = listener.expect("the-token", Guest)
        with pytest.raises(TimeoutError):
            await dial(listener.url, None, hello("the-token"))
        await arrived

"""A sandbox server that turns hostile: the real one, until its `at`-th flush (or its hello) is replaced by an attack.

Staged as `backends/server/__main__.py` beside the real one, `honest.py`. `attack.json` beside the packages says what to
do; only the first server that starts does it, all later ones are honest, so that a run can come to its end.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from backends.server import honest

HERE = Path(__file__).parents[2]
ATTACK: dict[str, Any] = orjson.loads((HERE / "attack.json").read_bytes())
MIB = 1 << 20


def frame(header: Any, *bodies: bytes) -> bytes:
    head = header if isinstance(header, bytes) else orjson.dumps(header)
    return struct.pack("<I", len(head)) + head + b"".join(bodies)


class Hostile(honest._Connection):
    """Honest until its time has come."""

    flushes = 0
    withheld: set[int] = set()  # noqa: RUF012  # one connection a process

    async def _flush(self) -> None:
        self.flushes += 1
        if self.flushes < ATTACK.get("at", 1) or not self._sessions.waiting:
            await super()._flush()
        else:
            self._sessions.watchdog.disarm()
            await getattr(self, ATTACK["name"])()

    async def send(self, header: Any, *bodies: bytes) -> None:
        await self._socket.send_bytes(frame(header, *bodies))

    def first(self) -> int:
        """The number of a call that waits for its answer."""
        header, _ = self._sessions.take()
        return next(entry[0] for entry in header if entry[0])

    async def random_bytes(self) -> None:
        await self._socket.send_bytes(os.urandom(300))

    async def huge_frame(self) -> None:
        await self._socket.send_bytes(frame([[self.first(), 0, 0.0, False, 17 * MIB]], b"x" * 17 * MIB))

    async def huge_body(self) -> None:
        await self._socket.send_bytes(frame([[self.first(), 0, 0.0, False, 5 * MIB]], b"x" * 5 * MIB))

    async def deep_header(self) -> None:
        await self.send(b"[" * 100_000)

    async def long_header(self) -> None:
        await self.send([[0, 2, 0.0, False, 0]] * 5000)

    async def bodies_do_not_add_up(self) -> None:
        await self.send([[self.first(), 0, 0.0, False, 1000]], b"x")

    async def never_made(self) -> None:
        await self.send([[10**9, 0, 0.0, False, 2]], b"{}")

    async def answered_twice(self) -> None:
        header, bodies = self._sessions.take()
        await self.send([*header, header[-1]], *bodies, bodies[-1])

    async def error_for_nobody(self) -> None:
        body = orjson.dumps({"code": "environment", "message": "m", "retryable": False})
        await self.send([[10**9, 1, 0.0, False, len(body)]], body)

    async def error_no_json(self) -> None:
        await self.send([[self.first(), 1, 0.0, False, 3]], b"no!")

    async def shouting_error(self) -> None:
        body = orjson.dumps({"code": "environment", "message": "x" * 3 * MIB, "retryable": False})
        await self.send([[self.first(), 1, 0.0, False, len(body)]], body)

    async def unknown_status(self) -> None:
        await self.send([[self.first(), 9, 0.0, False, 2]], b"{}")

    async def reward_not_finite(self) -> None:
        await self.send(b"[[%d,0,1e999,false,2]]" % self.first(), b"{}")

    async def false_toolset(self) -> None:
        body = b"0123456789abcdef\n[]"
        await self.send([[0, 2, 0.0, False, len(body)]], body)

    async def text_frame(self) -> None:
        await self._socket.send_str("hello again")

    async def hangs_up(self) -> None:
        await self._socket.close()
        await asyncio.sleep(60)

    async def closes_mid_frame(self) -> None:
        transport = self._socket.get_extra_info("transport") or self._socket._conn.transport
        transport.write(b"\x82\x7e\x40\x00abc")  # a binary frame of 16384 bytes, of which three come
        transport.close()
        await asyncio.sleep(60)

    async def exits(self) -> None:
        os._exit(0)

    async def answers_nothing(self) -> None:
        await asyncio.sleep(3600)

    async def withholds_one_answer(self) -> None:
        """One call is never answered, all others are."""
        header, bodies = self._sessions.take()
        keep = [place for place, entry in enumerate(header) if entry[0] not in self.withheld]
        if not self.withheld:
            self.withheld.add(header[keep.pop()][0])
        if keep:
            await self.send([header[place] for place in keep], *[bodies[place] for place in keep])

    async def tasks_no_json(self) -> None:
        await self.send([[self.first(), 0, 0.0, False, 3]], b"no!")

    async def tasks_of_wrong_types(self) -> None:
        body = orjson.dumps({"tasks": [1, None], "left_out": {"a": 5}})
        await self.send([[self.first(), 0, 0.0, False, len(body)]], body)


def bad_hello(environment: Any, config: dict[str, Any]) -> Any:
    return _HELLO(environment, config)._replace(**ATTACK["hello"])


async def bad_greeting(environment: Any, config: dict[str, Any], line: object, *, solutions: bool) -> None:
    """Connect, and say something else than hello, or nothing."""
    connector = aiohttp.UnixConnector(config["socket"])
    async with aiohttp.ClientSession(connector=connector) as http, http.ws_connect("http://orchestrator/") as socket:
        match ATTACK["greeting"]:
            case "text":
                await socket.send_str("hello")
            case "binary":
                await socket.send_bytes(b"\x00" * 100)
            case "huge":
                await socket.send_str("x" * 5 * MIB)
            case "list":
                await socket.send_str("[" * 1000)
            case _:
                pass
        await socket.receive()
    sys.exit(7)


_HELLO = honest._hello


def main() -> None:
    try:
        os.close(os.open(HERE / "struck", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        honest.main()
        return
    if "exit" in ATTACK:
        sys.exit(ATTACK["exit"])
    if "hello" in ATTACK:
        honest._hello = bad_hello
    if "greeting" in ATTACK:
        honest._serve = bad_greeting
    if "name" in ATTACK:
        honest._Connection = Hostile
    honest.main()


if __name__ == "__main__":
    main()

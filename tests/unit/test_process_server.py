"""The server's side of isolation `process`, with the tests in the place of the zygote and its children."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from test_process_parts import Odd

from backends.server import processes
from backends.server.environment import EnvironmentFault, Grade
from backends.server.pipe import Ask, Told, split_head
from backends.server.processes import CLOSE_S, ChildSession, Processes
from backends.server.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


class Graded(Odd):
    def grade(self, task: str, seed: int, options: Mapping[str, Any], state: bytes, params: Mapping[str, Any]) -> Grade:
        raise AssertionError("never in the server")


class Zygote:
    """The other end of a server's line."""

    def __init__(self, environment: Odd, **options: Any) -> None:
        ours, self.line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.line.setblocking(False)
        self.lost: list[str] = []
        self.channels: list[socket.socket] = []
        self.server = Processes(environment, ours, max_body=100, lost=self.lost.append, **options)

    def told(self, *report: object) -> None:
        self.line.send(orjson.dumps(report))

    async def order(self) -> list[Any]:
        """The next order; a child's end of its stream is kept."""
        while True:
            try:
                message, channels, _, _ = socket.recv_fds(self.line, 1000, 1)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            for fd in channels:
                self.channels.append(socket.socket(fileno=fd))
                self.channels[-1].setblocking(False)
            order: list[Any] = orjson.loads(message)
            return order

    async def asked(self) -> tuple[int, bytes]:
        """The next question to the youngest child."""
        loop = asyncio.get_running_loop()
        op, length = struct.unpack("<BI", await loop.sock_recv(self.channels[-1], 5))
        return op, await loop.sock_recv(self.channels[-1], length) if length else b""

    def answers(
        self, kind: int, body: bytes = b"{}", *, tools: bytes = b"", reward: float = 0.0, child: int = -1
    ) -> None:
        self.channels[child].send(struct.pack("<BdBII", kind, reward, 0, len(tools), len(body)) + tools + body)

    async def opened(self) -> ChildSession:
        """A session that this has opened."""
        opening = asyncio.create_task(self.server.open("a", 1, {}), name="opening")
        order, number, confined = await self.order()
        assert (order, confined) == ("fork", True)
        assert number == len(self.channels)
        op, body = await self.asked()
        assert (op, orjson.loads(body)["task"]) == (Ask.OPEN, "a")
        self.answers(Told.REPLY)
        return (await opening)[0]


@pytest.fixture
async def zygote(request: pytest.FixtureRequest) -> AsyncIterator[Zygote]:
    made = Zygote(*getattr(request, "param", (Odd(),)))
    made.told("ready", [])
    async with made.server:
        yield made
    made.line.close()
    for channel in made.channels:
        channel.close()
    for tether in made.server._children.values():
        tether._channel.close()
    for late in made.server._burials.values():
        late.cancel()


async def _fault(call: Any) -> EnvironmentFault:
    with pytest.raises(EnvironmentFault) as raised:
        await call
    return raised.value


async def test_a_session_from_opening_to_closing(zygote: Zygote) -> None:
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    assert await zygote.asked() == (Ask.STEP, b"action")
    zygote.answers(Told.REPLY, b"seen", tools=b"[]", reward=0.5)
    reply = await stepping
    assert (reply.body, reply.reward, reply.toolset and reply.toolset.body) == (b"seen", 0.5, b"[]")
    session.close()
    assert zygote.channels[0].recv(1) == b"", "the end of its questions"
    assert await zygote.order() == ["end", 1, CLOSE_S]
    zygote.told("ended", 1, 0)
    await _until(lambda: not zygote.server._children)
    assert not zygote.server._burials
    session.close()
    assert "exited with code 0" in str(await _fault(session.step(b"action")))


async def _until(holds: Any) -> None:
    while not holds():  # noqa: ASYNC110  # what is waited for comes through a reader of the loop's
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("kind", "body", "tools"),
    [
        (7, b"{}", b""),
        (Told.GRADE, b"{}", b""),
        (Told.STATE, b"{}", b""),
        (Told.REPLY, b"x" * 101, b""),
        (Told.REPLY, b"{}", b"{}"),
        (Told.REPLY, b"{}", b"["),
        (Told.FAULT, b"{", b""),
        (Told.FAULT, b"[]", b""),
        (Told.CRASH, b'{"message":5,"trace":""}', b""),
    ],
)
async def test_a_child_that_makes_no_sense_is_killed(zygote: Zygote, kind: int, body: bytes, tools: bytes) -> None:
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    await zygote.asked()
    zygote.answers(kind, body, tools=tools)
    fault = await _fault(stepping)
    assert (fault.code, fault.retryable) == (ErrorCode.SESSION_LOST, False)
    assert "broke its protocol" in str(fault)
    assert await zygote.order() == ["end", 1, 0.0]
    assert not zygote.lost


async def test_the_tool_sets_of_one_child_are_bounded_together(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_TOOLSET", 5)
    session = await zygote.opened()
    for tools, fits in ((b"[1]", True), (b"[]", True), (b"[]", False)):
        stepping = asyncio.create_task(session.step(b"action"), name="stepping")
        await zygote.asked()
        zygote.answers(Told.REPLY, tools=tools)
        if fits:
            assert (await stepping).toolset is not None
        else:
            assert "too many of them" in str(await _fault(stepping))
    assert await zygote.order() == ["end", 1, 0.0]


async def test_faults_and_crashes_leave_the_session(zygote: Zygote, capfd: pytest.CaptureFixture[str]) -> None:
    session = await zygote.opened()
    for kind, told, code in (
        (Told.FAULT, {"code": "unavailable", "message": "m", "retryable": True}, "unavailable"),
        (Told.CRASH, {"message": "m", "trace": "the trace"}, ErrorCode.ENVIRONMENT),
    ):
        stepping = asyncio.create_task(session.step(b"action"), name="stepping")
        await zygote.asked()
        zygote.answers(kind, orjson.dumps(told))
        fault = await _fault(stepping)
        assert (fault.code, str(fault), fault.retryable) == (code, "m", kind is Told.FAULT)
    assert "the trace" in capfd.readouterr().err


async def test_a_step_that_is_given_up_kills(zygote: Zygote) -> None:
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    await zygote.asked()
    stepping.cancel()
    await asyncio.wait({stepping})
    assert await zygote.order() == ["end", 1, 0.0]


async def test_an_opening_that_is_given_up_kills(zygote: Zygote) -> None:
    opening = asyncio.create_task(zygote.server.open("a", 1, {}), name="opening")
    assert await zygote.order() == ["fork", 1, True]
    opening.cancel()
    await asyncio.wait({opening})
    assert await zygote.order() == ["end", 1, 0.0]
    zygote.told("ended", 1, 9)
    await zygote.opened()


async def test_a_death_is_heard_of_though_its_stream_is_held_open(zygote: Zygote) -> None:
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    await zygote.asked()
    zygote.told("ended", 1, 11)
    fault = await _fault(stepping)
    assert (fault.code, "SIGSEGV" in str(fault)) == (ErrorCode.SESSION_LOST, True)


async def test_the_last_answer_of_what_dies_counts(zygote: Zygote) -> None:
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    await zygote.asked()
    zygote.answers(Told.REPLY, b"last")
    zygote.channels[0].close()
    zygote.told("ended", 1, 0)
    assert (await stepping).body == b"last"


@pytest.mark.parametrize("zygote", [(Graded(),)], indirect=True)
async def test_grading_elsewhere(zygote: Zygote) -> None:
    session = await zygote.opened()
    grading = asyncio.create_task(session.evaluate({"simple": True}), name="grading")
    assert (await zygote.asked())[0] == Ask.EXPORT
    zygote.answers(Told.STATE, b"state")
    assert await zygote.order() == ["fork", 2, False]
    op, body = await zygote.asked()
    head, state = split_head(body)
    assert (op, head["task"], head["params"], state) == (Ask.GRADE, "a", {"simple": True}, b"state")
    zygote.answers(Told.GRADE, b'{"x":1}', reward=0.25)
    assert await grading == Grade(0.25, {"x": 1})
    assert await zygote.order() == ["end", 2, 0.0]


@pytest.mark.parametrize("zygote", [(Odd(),)], indirect=True)
async def test_no_more_sessions_than_allowed(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ROOM_S", 0.0)
    zygote.server._room = asyncio.Semaphore(1)
    session = await zygote.opened()
    fault = await _fault(zygote.server.open("a", 1, {}))
    assert (fault.code, fault.retryable) == (ErrorCode.BUSY, True)
    session.close()
    await zygote.order()
    zygote.told("ended", 1, 0)
    await _until(lambda: not zygote.server._children)
    monkeypatch.setattr(processes, "ROOM_S", 2.0)
    await zygote.opened()


async def test_a_zygote_that_ends_takes_the_server_along(zygote: Zygote) -> None:
    zygote.line.close()
    await _until(lambda: zygote.lost)
    assert zygote.lost[0] == "the zygote ended"
    asyncio.get_running_loop().remove_reader(zygote.server._line)


async def test_a_zygote_that_talks_nonsense_takes_the_server_along(zygote: Zygote) -> None:
    zygote.told("what")
    await _until(lambda: zygote.lost)
    assert "the zygote reports ['what']" in zygote.lost[0]


async def test_notes_are_for_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    zygote = Zygote(Odd())
    zygote.told("ready", ["a note"])
    async with zygote.server:
        assert capfd.readouterr().err == "a note\n"
    zygote.line.close()


async def test_an_environment_that_cannot_be_loaded() -> None:
    zygote = Zygote(Odd())
    zygote.told("failed", "ValueError: no data")
    with pytest.raises(SystemExit, match="cannot be loaded: ValueError: no data"):
        async with zygote.server:
            raise AssertionError("entered")
    zygote.line.close()
    zygote.server._line.close()


async def test_a_zygote_that_buries_nobody_takes_the_server_along(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BURIAL_S", 0.0)
    session = await zygote.opened()
    stepping = asyncio.create_task(session.step(b"action"), name="stepping")
    await zygote.asked()
    stepping.cancel()
    await _until(lambda: zygote.lost)
    assert "does not bury" in zygote.lost[0]

"""The server's sessions: order, errors as data, caps, announcements, and the timer, without a connection."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
import pytest

from backends.environments.toy.inside import environment
from backends.server import sessions as server
from backends.server.environment import EnvironmentFault, Grade, Reply, Tasks, Toolset, observation, unavailable
from backends.server.sessions import Sessions, Watchdog
from backends.server.wire import MAX_CALLS, Call, ErrorCode, Op, Status, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Timer:
    """Stands in for the process's interval timer, which would end the tests."""

    def __init__(self) -> None:
        self.set: list[float] = []

    def setitimer(self, which: int, seconds: float) -> None:
        assert which == signal.ITIMER_REAL
        self.set.append(seconds)


@pytest.fixture(autouse=True)
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    timer = Timer()
    monkeypatch.setattr(signal, "setitimer", timer.setitimer)
    return timer


class Odd:
    """An environment whose sessions do what their task's name says."""

    name: ClassVar[str] = "odd"
    isolation: ClassVar[str] = "shared"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 8
    tools: ClassVar[Toolset] = Toolset([{"type": "function", "function": {"name": "ls"}}])

    def tasks(self, split: str) -> Tasks:
        if split == "later":
            raise unavailable("later", "time")
        return Tasks(["a"], {"later": (3, "time")})

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[OddSession, Reply]:
        body = observation([], toolset=self.tools)
        return OddSession(task), Reply(body, toolset=self.tools)

    def solution(self, task: str) -> Sequence[bytes]:
        raise EnvironmentFault(ErrorCode.UNKNOWN_TASK, "there is none", retryable=True)


class OddSession:
    def __init__(self, task: str) -> None:
        self.task = task

    def step(self, action: bytes) -> Any:
        match self.task:
            case "nothing":
                return None
            case "huge":
                return Reply(b"x" * 5000)
            case "infinite":
                return Reply(b"{}", reward=float("inf"))
            case "text":
                return Reply(b"{}", reward="1")  # type: ignore[arg-type]
            case "shout":
                raise RuntimeError("x" * 10_000)
            case "timeout":
                raise TimeoutError("my own")
            case "later":
                return self.fail_later()
            case _:
                return Reply(b"{}", reward=1)

    async def fail_later(self) -> Reply:
        raise TimeoutError("my own, later")

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        return Grade(float(params.get("reward", 0.5)), {"params": dict(params)})

    def close(self) -> None:
        raise RuntimeError("closing fails, too")


class Server:
    """Sessions, spoken to as a connection would, with answers by call."""

    def __init__(self, world: Any, *, solutions: bool = False, max_body: int = 4096) -> None:
        self.woken = asyncio.Event()
        self.sessions = Sessions(world, solutions=solutions, max_body=max_body, wake=self.woken.set)
        self.calls = 0

    def send(self, op: int, session: int = 1, seq: int = 0, body: bytes = b"", now: float = 0.0) -> None:
        self.calls += 1
        self.sessions.handle(Call(self.calls, op, session, seq, body), now)

    def ask(self, op: int, session: int = 1, seq: int = 0, body: bytes = b"") -> tuple[int, float, bool, Any]:
        """Status, reward, done and body of the call's own answer."""
        self.send(op, session, seq, body)
        [(number, status, reward, done, answered)] = [reply for reply in self.taken() if reply[0] != 0]
        assert number == self.calls
        return status, reward, done, orjson.loads(answered) if answered[:1] in b"{[" else answered

    def taken(self) -> list[tuple[int, int, float, bool, bytes]]:
        header, bodies = self.sessions.take()
        return [(*entry[:4], body) for entry, body in zip(header, bodies, strict=True)]

    def open(self, task: str = "toy_2", session: int = 1) -> None:
        status, *_ = self.ask(Op.OPEN, session, 0, orjson.dumps({"task": task, "seed": 3, "step_timeout_s": 2.0}))
        assert status == Status.OK

    def error(self, op: int, session: int = 1, seq: int = 0, body: bytes = b"") -> tuple[str, str]:
        status, _, _, told = self.ask(op, session, seq, body)
        assert status == Status.ERROR
        return told["code"], told["message"]


def say(content: str) -> bytes:
    return orjson.dumps({"role": "assistant", "content": content})


class TestOrder:
    async def test_calls_run_in_the_order_of_their_numbers(self) -> None:
        toy = Server(environment())
        toy.open()
        assert toy.error(Op.STEP, 1, 2, say("add 1")) == (ErrorCode.OUT_OF_ORDER, "call 2 of session 1, not 1")
        assert toy.error(Op.STEP, 1, 0, say("add 1"))[0] == ErrorCode.OUT_OF_ORDER
        assert toy.ask(Op.STEP, 1, 1, say("add 1"))[3]["messages"][0]["content"] == "total 1"
        assert toy.error(Op.STEP, 1, 1, say("add 1"))[0] == ErrorCode.OUT_OF_ORDER, "a step runs once"

    async def test_what_is_not_open(self) -> None:
        toy = Server(environment())
        for op in (Op.STEP, Op.EVALUATE):
            assert toy.error(op, 5, 0) == (ErrorCode.UNKNOWN_SESSION, "session 5 is not open")
        toy.send(Op.CLOSE, 5, 0)
        assert not toy.sessions.waiting, "closing is never answered"
        toy.open(session=5)
        toy.send(Op.CLOSE, 5, 1)
        assert toy.error(Op.STEP, 5, 1, say("add 1"))[0] == ErrorCode.UNKNOWN_SESSION

    async def test_opening_twice(self) -> None:
        toy = Server(environment())
        toy.open()
        code, message = toy.error(Op.OPEN, 1, 1, orjson.dumps({"task": "toy_2"}))
        assert (code, message) == (ErrorCode.BAD_REQUEST, "session 1 is open already")
        assert toy.ask(Op.STEP, 1, 2, say("add 1"))[0] == Status.OK, "and the session lives on"

    async def test_a_session_that_did_not_open_is_forgotten(self) -> None:
        toy = Server(environment())
        assert toy.error(Op.OPEN, 1, 0, orjson.dumps({"task": "open_error"}))[0] == ErrorCode.ENVIRONMENT
        assert toy.error(Op.OPEN, 1, 1, orjson.dumps({"task": "toy_1"}))[0] == ErrorCode.OUT_OF_ORDER
        toy.open()

    async def test_calls_behind_a_waiting_step(self) -> None:
        toy = Server(environment())
        toy.open(session=1)
        toy.open(session=2)
        toy.send(Op.STEP, 1, 1, say("sleep 0"))
        toy.send(Op.STEP, 1, 2, say("add 5"))
        toy.send(Op.EVALUATE, 1, 3)
        toy.send(Op.STEP, 2, 1, say("add 1"))
        [(number, *_)] = toy.taken()
        assert number == 6, "another session is not held back"
        await toy.woken.wait()
        answers = toy.taken()
        assert [number for number, *_ in answers] == [3, 4, 5]
        assert b"slept" in answers[0][4]
        assert b"total 5" in answers[1][4]
        toy.send(Op.CLOSE, 1, 4)
        assert toy.error(Op.STEP, 1, 5, say("add 1"))[0] == ErrorCode.UNKNOWN_SESSION

    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_closing_ends_what_waits(self, turns: int) -> None:
        toy = Server(environment())
        toy.open()
        toy.send(Op.STEP, 1, 1, say("sleep 3600"))
        toy.send(Op.STEP, 1, 2, say("add 5"))
        for _ in range(turns):
            await asyncio.sleep(0)
        toy.send(Op.CLOSE, 1, 3)
        answers = toy.taken()
        assert [(number, status) for number, status, *_ in answers] == [(2, Status.ERROR), (3, Status.ERROR)]
        await asyncio.sleep(0)
        assert not toy.sessions.waiting


class TestErrors:
    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b"[]",
            b"{}",
            orjson.dumps({"task": 5}),
            orjson.dumps({"task": "toy_1", "seed": "x"}),
            orjson.dumps({"task": "toy_1", "options": []}),
            orjson.dumps({"task": "toy_1", "step_timeout_s": 0}),
            orjson.dumps({"task": "toy_1", "step_timeout_s": "1"}),
        ],
    )
    async def test_malformed_openings(self, body: bytes) -> None:
        assert Server(environment()).error(Op.OPEN, 1, 0, body)[0] == ErrorCode.BAD_REQUEST

    async def test_unknown_operation(self) -> None:
        toy = Server(environment())
        toy.open()
        assert toy.error(99, 1, 1) == (ErrorCode.BAD_REQUEST, "unknown operation 99")

    async def test_an_environment_that_raises(self, capfd: pytest.CaptureFixture[str]) -> None:
        toy = Server(environment())
        toy.open()
        assert toy.error(Op.STEP, 1, 1, say("error"))[0] == ErrorCode.ENVIRONMENT
        assert "RuntimeError: the environment is broken on request" in capfd.readouterr().err
        assert toy.ask(Op.STEP, 1, 2, say("add 1"))[0] == Status.OK

    @pytest.mark.parametrize(
        ("task", "code", "says"),
        [
            ("nothing", ErrorCode.ENVIRONMENT, "OddSession returned NoneType"),
            ("huge", ErrorCode.TOO_LARGE, "the reply has 5000 bytes; the cap is 4096"),
            ("infinite", ErrorCode.BAD_REWARD, "the reward inf"),
            ("text", ErrorCode.BAD_REWARD, "the reward '1'"),
            ("shout", ErrorCode.ENVIRONMENT, "RuntimeError: xxx"),
            ("timeout", ErrorCode.ENVIRONMENT, "TimeoutError: my own"),
        ],
    )
    async def test_odd_answers(self, task: str, code: str, says: str) -> None:
        odd = Server(Odd())
        odd.open(task)
        told, message = odd.error(Op.STEP, 1, 1)
        assert told == code
        assert says in message
        assert len(message) <= 2000

    async def test_an_environments_own_timeout_is_not_ours(self) -> None:
        odd = Server(Odd())
        odd.open("later")
        odd.send(Op.STEP, 1, 1)
        await odd.woken.wait()
        [(_, status, _, _, body)] = odd.taken()
        assert status == Status.ERROR
        assert orjson.loads(body)["code"] == ErrorCode.ENVIRONMENT

    async def test_closing_that_raises_closes(self, capfd: pytest.CaptureFixture[str]) -> None:
        odd = Server(Odd())
        odd.open("any")
        odd.send(Op.CLOSE, 1, 1)
        assert "closing fails, too" in capfd.readouterr().err
        assert odd.error(Op.STEP, 1, 1)[0] == ErrorCode.UNKNOWN_SESSION

    @pytest.mark.looptime
    async def test_a_step_that_waits_too_long(self) -> None:
        toy = Server(environment())
        toy.open()
        toy.send(Op.STEP, 1, 1, say("sleep 100"))
        await toy.woken.wait()
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)
        [(_, status, _, _, body)] = toy.taken()
        assert status == Status.ERROR
        assert orjson.loads(body)["code"] == ErrorCode.STEP_TIMEOUT


class TestAnswers:
    async def test_grades(self) -> None:
        odd = Server(Odd())
        odd.open("any")
        assert odd.ask(Op.EVALUATE, 1, 1) == (Status.OK, 0.5, True, {"params": {}})
        assert odd.ask(Op.EVALUATE, 1, 2, b'{"reward":0.25}')[1] == 0.25
        assert odd.error(Op.EVALUATE, 1, 3, b"[]")[0] == ErrorCode.BAD_REQUEST
        assert odd.error(Op.EVALUATE, 1, 4, b'{"reward":"nan"}')[0] == ErrorCode.BAD_REWARD

    async def test_a_tool_set_is_announced_once_before_it_is_named(self) -> None:
        odd = Server(Odd())
        odd.send(Op.OPEN, 1, 0, b'{"task":"a"}')
        odd.send(Op.OPEN, 2, 0, b'{"task":"a"}')
        replies = odd.taken()
        assert [(number, status) for number, status, *_ in replies] == [(0, Status.TOOLSET), (1, 0), (2, 0)]
        assert replies[0][4] == Odd.tools.digest.encode() + b"\n" + Odd.tools.body

    async def test_tasks_and_what_is_left_out(self) -> None:
        odd = Server(Odd())
        assert odd.ask(Op.TASKS)[3] == {"tasks": ["a"], "left_out": {"later": {"count": 3, "needs": "time"}}}
        code, message = odd.error(Op.TASKS, body=b'{"split":"later"}')
        assert (code, message) == (ErrorCode.UNAVAILABLE, "later cannot run here: it needs time")

    async def test_solutions_are_for_those_who_asked(self) -> None:
        assert Server(environment()).error(Op.SOLUTION, body=b'{"task":"toy_1"}')[0] == ErrorCode.FORBIDDEN
        answers = Server(environment(), solutions=True).ask(Op.SOLUTION, body=b'{"task":"toy_1"}')[3]
        assert [orjson.loads(action)["content"] for action in answers] == ["add 1", "add 1", "stop"]
        status, _, _, told = Server(Odd(), solutions=True).ask(Op.SOLUTION, body=b'{"task":"a"}')
        assert status == Status.ERROR
        assert told == {"code": ErrorCode.UNKNOWN_TASK, "message": "there is none", "retryable": True}

    async def test_frames_are_bounded_by_count_and_by_bytes(self) -> None:
        toy = Server(environment(), max_body=4 << 20)
        toy.open(session=1)
        for number in range(MAX_CALLS + 5):
            toy.send(Op.STEP, 1, number + 1, b"{}")
        assert [len(toy.taken()) for _ in range(3)] == [MAX_CALLS, 5, 0]
        toy.open(session=2)
        for number in range(7):
            toy.send(Op.STEP, 2, number + 1, say("big 4000000"))
        sizes, answered = [], 0
        while toy.sessions.waiting:
            header, bodies = toy.sessions.take()
            sizes.append(len(encode(header, bodies)))
            answered += len(header)
        assert answered == 7
        assert max(sizes) <= server.MAX_REPLIES_BYTES + 4096
        assert toy.sessions.waiting_bytes == 0


class TestTimer:
    async def test_armed_for_a_call_with_its_sessions_limit(self, timer: Timer) -> None:
        toy = Server(environment())
        toy.open()
        toy.send(Op.STEP, 1, 1, say("add 1"))
        assert timer.set[-1] == 2.0
        toy.sessions.watchdog.disarm()
        assert timer.set[-1] == 0

    def test_armed_anew_only_when_a_tenth_of_the_limit_has_passed(self, timer: Timer) -> None:
        watchdog = Watchdog()
        for now in (100.0, 100.5, 100.9):
            watchdog.arm(now, 10.0)
        assert timer.set == [10.0]
        watchdog.arm(101.1, 10.0)
        assert timer.set == [10.0, 10.0]
        watchdog.arm(101.2, 1.0)
        assert timer.set == [10.0, 10.0, 1.0], "a shorter limit counts at once"
        watchdog.arm(101.3, 10.0)
        assert timer.set == [10.0, 10.0, 1.0, 10.0], "a longer one, too: the step before it has ended"

    def test_disarming_what_is_not_armed_costs_nothing(self, timer: Timer) -> None:
        watchdog = Watchdog()
        watchdog.disarm()
        assert timer.set == []
        watchdog.arm(1.0, 5.0)
        watchdog.disarm()
        watchdog.disarm()
        assert timer.set == [5.0, 0]

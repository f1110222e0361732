"""The parts of isolation `process` that need no process: places outside secrets, the stream's protocol, answers."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.server import confine, pipe, zygote
from backends.server.child import Child
from backends.server.confine import outside
from backends.server.environment import Grade, Reply, Tasks, Toolset, observation, unknown_task
from backends.server.pipe import Answer, Ask, Garbled, Told, ask, give, next_question, split_head, with_head
from backends.server.tether import _loss
from backends.server.wire import ErrorCode
from backends.server.zygote import NOT_FORKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMES = st.sampled_from("abc")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: Path(*parts))


class TestOutside:
    @settings(max_examples=30)
    @given(files=st.sets(PATHS, max_size=8), closed=st.sets(PATHS, min_size=1, max_size=3))
    def test_every_file_is_granted_or_secret(self, files: set[Path], closed: set[Path]) -> None:
        with tempfile.TemporaryDirectory() as made:
            root = Path(made).resolve()
            for file in files:
                (root / file).mkdir(parents=True, exist_ok=True)
                (root / file / "file").touch()
            secrets = {root / path for path in closed}
            places = set(outside(secrets))
            assert places.isdisjoint(secrets)
            for path in root.rglob("*"):
                secret = not secrets.isdisjoint({path, *path.parents})
                granted = not places.isdisjoint({path, *path.parents})
                leads_to_one = any(path in one.parents for one in secrets)
                assert granted != (secret or leads_to_one), path

    def test_links_are_no_places(self, tmp_path: Path) -> None:
        (tmp_path / "secret").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "secret")
        (tmp_path / "beside").touch()
        found = [path for path in outside([tmp_path / "secret"]) if tmp_path in path.parents]
        assert found == [tmp_path / "beside"]

    def test_no_secrets_no_places(self) -> None:
        assert list(outside([])) == []


def asked(told: bytes, *, max_body: int = 1000) -> Answer | None:
    """What the server makes of this, where it expects an answer."""

    async def converse() -> Answer | None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(told)
            theirs.shutdown(socket.SHUT_WR)
            ours.setblocking(False)
            return await ask(ours, Ask.STEP, b"question", max_body=max_body)

    return asyncio.run(converse())


def wrote(answer: Answer) -> bytes:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            give(theirs, answer)
        return ours.recv(1 << 20)


ANSWERS = st.builds(
    Answer,
    st.sampled_from(Told),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.binary(max_size=50),
    st.binary(max_size=200),
)


class TestStream:
    @given(answer=ANSWERS)
    def test_answers_come_back(self, answer: Answer) -> None:
        assert asked(wrote(answer)) == answer

    @given(answer=ANSWERS, cut=st.integers(min_value=1, max_value=20))
    def test_an_answer_that_breaks_off_is_none(self, answer: Answer, cut: int) -> None:
        assert asked(wrote(answer)[:-cut]) is None

    @given(told=st.binary(max_size=60))
    def test_whatever_a_child_writes(self, told: bytes) -> None:
        try:
            answer = asked(told, max_body=40)
        except Garbled:
            return
        assert answer is None or len(answer.body) <= 40

    @pytest.mark.parametrize(
        ("kind", "reward", "done", "tools", "length"),
        [
            (9, 0.0, 0, 0, 0),
            (Told.REPLY, float("nan"), 0, 0, 0),
            (Told.REPLY, float("-inf"), 0, 0, 0),
            (Told.REPLY, 0.0, 2, 0, 0),
            (Told.REPLY, 0.0, 0, 0, 1001),
            (Told.REPLY, 0.0, 0, pipe.MAX_TOOLSET + 1, 0),
            (Told.STATE, 0.0, 0, 0, pipe.MAX_STATE + 1),
            (Told.CRASH, 0.0, 0, 0, pipe.MAX_ERROR + 1),
        ],
    )
    def test_what_is_refused_before_it_is_read(
        self, kind: int, reward: float, done: int, tools: int, length: int
    ) -> None:
        with pytest.raises(Garbled):
            asked(struct.pack("<BdBII", kind, reward, done, tools, length))

    @given(questions=st.lists(st.tuples(st.sampled_from(Ask), st.binary(max_size=100)), max_size=5))
    def test_questions_come_through(self, questions: list[tuple[Ask, bytes]]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for op, body in questions:
                ours.sendall(struct.pack("<BI", op, len(body)) + body)
            ours.shutdown(socket.SHUT_WR)
            assert [next_question(theirs) for _ in questions] == questions
            assert next_question(theirs) is None

    @given(head=st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3), tail=st.binary(max_size=50))
    def test_heads(self, head: dict[str, int], tail: bytes) -> None:
        assert split_head(b"".join(with_head(head, tail))) == (head, tail)


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (3 << 8, ErrorCode.SESSION_LOST, "exited with code 3"),
        (0, ErrorCode.SESSION_LOST, "exited with code 0"),
        (signal.SIGSEGV, ErrorCode.SESSION_LOST, "died of SIGSEGV"),
        (signal.SIGKILL, ErrorCode.SESSION_LOST, "out of memory, or killed"),
        (40, ErrorCode.SESSION_LOST, "died of signal 40"),
        (NOT_FORKED, ErrorCode.BUSY, "could not be forked"),
    ],
)
def test_ends_in_words(status: int, code: str, says: str) -> None:
    fault = _loss(int(status))
    assert (fault.code, fault.retryable) == (code, code == ErrorCode.BUSY)
    assert says in str(fault)


class Odd:
    """An environment whose sessions answer by their task's name; it cannot grade elsewhere."""

    name: ClassVar[str] = "odd"
    isolation: ClassVar[str] = "process"
    deterministic: ClassVar[bool] = True
    runs_code: ClassVar[bool] = False
    max_turns: ClassVar[int] = 8
    tools: ClassVar[Toolset] = Toolset([{"type": "function", "function": {"name": "ls"}}])

    def tasks(self, split: str) -> Tasks:
        return Tasks(["a"])

    def open(self, task: str, seed: int, options: Mapping[str, Any]) -> tuple[OddSession, Reply]:
        if task == "unknown":
            raise unknown_task(task)
        return OddSession(task), Reply(observation([], toolset=self.tools), toolset=self.tools)

    def solution(self, task: str) -> Sequence[bytes]:
        return []


class OddSession:
    def __init__(self, task: str) -> None:
        self.task = task

    async def later(self) -> Reply:
        return Reply(b"{}")

    def step(self, action: bytes) -> Any:
        match self.task:
            case "later":
                waiting = self.later()
                waiting.close()
                return waiting
            case "huge":
                return Reply(b"x" * 101)
            case "infinite":
                return Reply(b"{}", reward=float("inf"))
            case "text":
                return Reply(b"{}", reward="1")  # type: ignore[arg-type]
            case "shout":
                raise RuntimeError("\ud800" * 10_000)
            case "beep":
                raise RuntimeError("\x07" * 10_000)
            case _:
                return Reply(b"{}", toolset=Odd.tools)

    def evaluate(self, params: Mapping[str, Any]) -> Grade:
        return Grade(0.5, {"params": dict(params)})

    def close(self) -> None:
        return None


def opened(task: str) -> Child:
    child = Child(Odd())
    body = {"task": task, "seed": 1, "options": {}, "max_body": 100}
    assert child._answer(Ask.OPEN, orjson.dumps(body)).kind == Told.REPLY
    return child


class TestAnswers:
    @pytest.mark.parametrize(
        ("task", "kind", "says"),
        [
            ("huge", Told.FAULT, "the reply has 101 bytes; the cap is 100"),
            ("infinite", Told.FAULT, "the reward inf, not a finite number"),
            ("text", Told.FAULT, "the reward '1', not a finite number"),
            ("later", Told.CRASH, "TypeError: isolation process needs a Reply from a plain function, not coroutine"),
            ("shout", Told.CRASH, r"RuntimeError: \ud800"),
            ("beep", Told.CRASH, "RuntimeError: \x07"),
        ],
    )
    def test_what_goes_wrong_is_an_answer(self, task: str, kind: Told, says: str) -> None:
        answer = opened(task)._answer(Ask.STEP, b"{}")
        assert answer.kind == kind
        assert says in orjson.loads(answer.body)["message"]
        assert len(answer.body) < pipe.MAX_ERROR

    def test_a_tool_set_is_told_once(self) -> None:
        child = Child(Odd())
        first = child._answer(Ask.OPEN, orjson.dumps({"task": "a", "seed": 1, "options": {}, "max_body": 100}))
        assert first.toolset == Odd.tools.body
        assert child._answer(Ask.STEP, b"{}").toolset == b""

    def test_a_grade(self) -> None:
        answer = opened("a")._answer(Ask.EVALUATE, b'{"x":1}')
        assert (answer.kind, answer.reward, orjson.loads(answer.body)) == (Told.GRADE, 0.5, {"params": {"x": 1}})

    def test_what_the_environment_does_not_have(self) -> None:
        child = opened("a")
        spec = {"task": "a", "seed": 1, "options": {}, "params": {}, "max_body": 100}
        for op, body in ((Ask.EXPORT, b""), (Ask.GRADE, b"".join(with_head(spec, b"state")))):
            answer = child._answer(op, body)
            assert answer.kind == Told.CRASH
            assert "TypeError" in orjson.loads(answer.body)["message"]

    def test_a_session_that_did_not_open(self) -> None:
        child = Child(Odd())
        body = {"task": "unknown", "seed": 1, "options": {}, "max_body": 100}
        assert orjson.loads(child._answer(Ask.OPEN, orjson.dumps(body)).body)["code"] == ErrorCode.UNKNOWN_TASK
        assert orjson.loads(child._answer(Ask.STEP, b"{}").body)["code"] == ErrorCode.UNKNOWN_SESSION


class Secretive(Odd):
    def secrets(self) -> Sequence[Path]:
        return [Path("/nowhere")]


@pytest.mark.parametrize("environment", [Odd(), Secretive()])
def test_where_the_kernel_closes_nothing(environment: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "version", lambda: 0)
    confinement, said = zygote._confinement(environment)
    assert confinement is None
    assert len(said) == 1

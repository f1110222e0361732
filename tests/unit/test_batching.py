"""The batcher against a model: whatever the order of calls, answers and the connection's end, each call ends once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.batching import MAX_BYTES, MAX_CALLS, Batcher
from orchestrator.errors import SandboxError, SandboxLost
from orchestrator.types import Failure, FailureKind, Observation

if TYPE_CHECKING:
    from orchestrator.batching import Answer

LOST = Failure(FailureKind.SANDBOX_LOST, "call", "it died")
OPEN, STEP, EVALUATE, CLOSE = 1, 2, 3, 4


def answer(number: int, body: bytes = b"{}") -> Answer:
    return (number, 0, 0.5, False, body)


def refusal(stage: str) -> SandboxError:
    return SandboxError(Failure(FailureKind.ENVIRONMENT, stage, "refused"))


class Modelled:
    """A batcher, and what every call must come to."""

    def __init__(self) -> None:
        self.batcher = Batcher()
        self.futures: dict[int, asyncio.Future[Observation]] = {}
        self.queued: list[int] = []
        self.sent: list[int] = []
        self.posted: set[int] = set()
        self.ended: dict[int, object] = {}
        self.made = 0
        self.failed = False

    def call(self, size: int) -> None:
        self.made += not self.failed
        future = self.batcher.call(STEP, 1, 0, b"x" * size)
        if self.failed:
            error = future.exception()
            assert isinstance(error, SandboxLost)
            assert not error.suspect
            return
        self.futures[self.made] = future
        self.queued.append(self.made)

    def post(self) -> None:
        self.batcher.post(CLOSE, 1, 9)
        if not self.failed:
            self.made += 1
            self.queued.append(self.made)
            self.posted.add(self.made)

    def take(self) -> None:
        header, bodies = self.batcher.take()
        assert [entry[4] for entry in header] == [len(body) for body in bodies]
        assert len(header) <= MAX_CALLS
        assert sum(map(len, bodies[:-1])) < MAX_BYTES
        numbers = [entry[0] for entry in header]
        assert numbers == self.queued[: len(numbers)], "calls leave in their order"
        assert numbers or not self.queued, "a batch takes what waits"
        del self.queued[: len(numbers)]
        self.sent += [number for number in numbers if number not in self.posted]
        assert self.batcher.ready.is_set() == bool(self.queued)

    def settle(self, number: int) -> None:
        body = b"%d" % number
        left = self.batcher.settle([answer(number, body)])
        if number in self.sent:
            assert left == []
            self.sent.remove(number)
            self.ended.setdefault(number, body)
        else:
            assert left == [answer(number, body)], "an answer to a call that does not wait is handed back"

    def refuse(self, number: int) -> None:
        known = self.batcher.refuse(number, refusal)
        assert known == (number in self.sent)
        if known:
            self.sent.remove(number)
            self.ended.setdefault(number, "refused")

    def cancel(self, number: int) -> None:
        if number in self.futures and self.futures[number].cancel():
            self.ended[number] = "cancelled"  # and the answer, when it comes, is still expected

    def fail(self) -> None:
        suspects, innocent = list(self.sent), [number for number in self.queued if number in self.futures]
        self.batcher.fail(LOST)
        if not self.failed:
            self.ended |= {number: "suspect" for number in suspects if number not in self.ended}
            self.ended |= {number: "innocent" for number in innocent if number not in self.ended}
            self.sent, self.queued, self.failed = [], [], True

    def check(self) -> None:
        counts = self.batcher.statistics()
        waiting = [number for number in self.queued if number in self.futures]
        assert (counts.queued, counts.pending) == (len(self.queued), len(self.sent) + len(waiting))
        assert counts.calls == self.made
        for number, future in self.futures.items():
            assert future.done() == (number in self.ended), f"call {number}"
            if future.done():
                self.check_end(future, self.ended[number])

    def check_end(self, future: asyncio.Future[Observation], end: object) -> None:
        if isinstance(end, bytes):
            assert future.result() == Observation(end, 0.5, False)
        elif end == "cancelled":
            assert future.cancelled()
        else:
            error = future.exception()
            assert isinstance(error, SandboxError)
            assert error.failure.stage in {"step", "call"}
            assert isinstance(error, SandboxLost) == (end != "refused")
            assert getattr(error, "suspect", None) is {"suspect": True, "innocent": False}.get(str(end))


_NUMBERS = st.integers(0, 12)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from([0, 10, MAX_BYTES // 2, MAX_BYTES + 1])),
        st.tuples(st.sampled_from(["post", "take", "take", "take"])),
        st.tuples(st.sampled_from(["settle", "settle", "refuse", "cancel"]), _NUMBERS),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(events=EVENTS, end=st.booleans(), afterwards=EVENTS)
async def test_any_order_of_events(
    events: list[tuple[object, ...]], end: bool, afterwards: list[tuple[object, ...]]
) -> None:
    modelled = Modelled()
    for name, *arguments in [*events, *([("fail",), *afterwards, ("fail",)] if end else [])]:
        getattr(modelled, str(name))(*arguments)
        modelled.check()


async def test_what_is_asked_in_one_turn_leaves_in_one_batch() -> None:
    batcher = Batcher()
    futures = [batcher.call(STEP, session, 1, b"{}") for session in range(1000)]
    assert batcher.ready.is_set()
    header, _ = batcher.take()
    assert len(header) == 1000
    assert not batcher.ready.is_set()
    assert batcher.statistics() == (0, 1000, 1000, 1)
    assert batcher.settle([answer(number) for number in range(1, 1001)]) == []
    assert all(future.result() for future in futures)
    assert repr(batcher) == "<Batcher queued=0 pending=0 calls=1000 batches=1>"


async def test_batches_are_bounded_by_count_and_by_bytes() -> None:
    batcher = Batcher()
    for _ in range(MAX_CALLS + 1):
        batcher.post(CLOSE, 1, 1)
    assert len(batcher.take()[0]) == MAX_CALLS
    assert batcher.ready.is_set()
    assert len(batcher.take()[0]) == 1
    for _ in range(3):
        batcher.call(STEP, 1, 1, b"x" * (MAX_BYTES // 2))
    assert len(batcher.take()[0]) == 2
    batcher.call(STEP, 1, 1, b"x" * 3 * MAX_BYTES)
    assert [len(batcher.take()[0]) for _ in range(2)] == [2, 0]


async def test_an_answer_before_its_call_was_sent_is_handed_back() -> None:
    batcher = Batcher()
    future = batcher.call(STEP, 1, 1, b"{}")
    assert batcher.settle([answer(1)]) == [answer(1)]
    assert not batcher.refuse(1, refusal)
    assert not future.done()
    batcher.take()
    assert batcher.settle([answer(1), answer(1)]) == [answer(1)], "the second is one too many"
    assert future.done()


@pytest.mark.parametrize(("op", "stage"), [(OPEN, "open"), (STEP, "step"), (EVALUATE, "evaluate"), (5, "call")])
async def test_losses_and_refusals_name_the_stage(op: int, stage: str) -> None:
    batcher = Batcher()
    refused, lost = batcher.call(op, 1, 1, b""), batcher.call(op, 1, 2, b"")
    batcher.take()
    batcher.refuse(1, refusal)
    batcher.fail(LOST)
    for future in (refused, lost):
        error = future.exception()
        assert isinstance(error, SandboxError)
        assert error.failure.stage == stage


@pytest.mark.looptime
class TestDeadlines:
    """Progress counts, not the age of a call; but no call is forgotten behind others' progress."""

    async def test_nothing_sent_is_never_overdue(self) -> None:
        batcher = Batcher()
        batcher.call(STEP, 1, 1, b"")
        await asyncio.sleep(100)
        assert batcher.overdue(self.now(), 1.0) is None
        batcher.take()
        assert batcher.overdue(self.now(), 1.0) is None, "the clock begins when it is sent"

    async def test_no_progress(self) -> None:
        batcher = Batcher()
        batcher.call(STEP, 1, 1, b"")
        batcher.take()
        await asyncio.sleep(1.0)
        assert batcher.overdue(self.now(), 1.0) is None
        await asyncio.sleep(0.1)
        failure = batcher.overdue(self.now(), 1.0)
        assert failure is not None
        assert failure.kind is FailureKind.SANDBOX_HUNG
        assert "no answer for 1.1 s (limit 1 s)" in failure.message

    async def test_a_long_idle_connection_starts_anew(self) -> None:
        batcher = Batcher()
        batcher.call(STEP, 1, 1, b"")
        batcher.take()
        batcher.settle([answer(1)])
        await asyncio.sleep(50)
        batcher.call(STEP, 1, 2, b"")
        batcher.take()
        assert batcher.overdue(self.now() + 0.9, 1.0) is None
        assert batcher.overdue(self.now() + 1.1, 1.0) is not None

    async def test_waiting_behind_others_is_no_hang(self) -> None:
        batcher = Batcher()
        for number in range(4):
            batcher.call(STEP, number, 1, b"")
        batcher.take()
        for number in (1, 2, 3):
            await asyncio.sleep(0.9)
            assert batcher.overdue(self.now(), 1.0) is None
            batcher.settle([answer(number)])
        await asyncio.sleep(0.9)
        assert batcher.overdue(self.now(), 1.0) is None
        await asyncio.sleep(0.2)
        assert batcher.overdue(self.now(), 1.0) is not None

    async def test_a_call_left_behind_while_others_are_answered(self) -> None:
        batcher = Batcher()
        batcher.call(STEP, 1, 1, b"")
        batcher.take()
        for number in range(2, 10):
            batcher.call(STEP, number, 1, b"")
            batcher.take()
            await asyncio.sleep(0.5)
            batcher.settle([answer(number)])
        assert batcher.overdue(self.now(), 1.0) is None
        await asyncio.sleep(0.1)
        failure = batcher.overdue(self.now(), 1.0)
        assert failure is not None
        assert "a call was left unanswered for 4.1 s" in failure.message

    async def test_the_oldest_is_known_by_its_batch(self) -> None:
        batcher = Batcher()
        for number in range(1, 5):
            batcher.call(STEP, number, 1, b"")
            batcher.take()
            await asyncio.sleep(1.0)
        assert batcher.oldest == 0.0
        batcher.settle([answer(1), answer(3)])
        assert batcher.oldest == 1.0
        batcher.settle([answer(2)])
        assert batcher.oldest == 3.0
        batcher.settle([answer(4)])
        assert batcher.oldest is None

    def now(self) -> float:
        return asyncio.get_running_loop().time()

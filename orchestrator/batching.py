"""Coalesces the calls of all episodes on one sandbox: what is asked for in one turn of the loop leaves in one batch.

Owns the calls that wait to be sent and the futures that wait for an answer. Always true: a call's future is in
`pending` until it is done or its owner has gone; ids only grow, and calls leave in their order; after `fail` nothing
waits and every further call fails at once. The connection's sender waits on `ready` and sends what `take` returns; its
reader hands replies to `settle` and errors to `refuse`.

A step's cost is here, so a call is a header entry, a body and a future: no object, task, timer or timeout of its own.
Deadlines are one look at the oldest pending call (`overdue`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import SandboxLost
from orchestrator.types import Failure, FailureKind, Observation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeAlias

    Entry: TypeAlias = tuple[int, int, int, int, int]
    """id, operation, session, sequence number, length of the body."""
    Answer: TypeAlias = tuple[int, int, float, bool, bytes]
    """id, status, reward, done, body."""

MAX_CALLS: Final = 1024
MAX_BYTES: Final = 1024 * 1024
_OK: Final = 0
"""The status of an answer that is an observation."""
_STAGES: Final = {1: "open", 2: "step", 3: "evaluate"}


class BatcherStatistics(NamedTuple):
    """Counts since the start; `queued` and `pending` are now, and `pending` includes the queued."""

    queued: int
    pending: int
    calls: int
    batches: int


class Batcher:
    """One sandbox's calls. Bound to the running loop; used from it alone."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._header: list[Entry] = []
        self._bodies: list[bytes] = []
        self._pending: dict[int, tuple[asyncio.Future[Observation], int]] = {}
        """id -> future, operation."""
        self._sent: deque[tuple[int, float]] = deque()
        """First id and time of each batch that may have pending calls, oldest first."""
        self._next_id = 1
        self._last_taken = 0
        self._batches = 0
        self._failure: Failure | None = None
        self.ready = asyncio.Event()
        self.last_answer = self._loop.time()
        """Monotonic time of the newest sign of life."""

    def call(self, op: int, session: int, seq: int, body: bytes) -> asyncio.Future[Observation]:
        """Queue a call; await the future for its answer. It raises SandboxLost or what `refuse` was given."""
        future: asyncio.Future[Observation] = self._loop.create_future()
        if self._failure is not None:
            future.set_exception(SandboxLost(self._failure, suspect=False))
            return future
        number = self._next_id
        self._next_id = number + 1
        self._header.append((number, op, session, seq, len(body)))
        self._bodies.append(body)
        self._pending[number] = (future, op)
        if number == self._header[0][0]:  # the first of a batch: later ones find the sender awake
            self.ready.set()
        return future

    def post(self, op: int, session: int, seq: int) -> None:
        """Queue a call that nobody waits for."""
        if self._failure is None:
            number = self._next_id
            self._next_id = number + 1
            self._header.append((number, op, session, seq, 0))
            self._bodies.append(b"")
            self.ready.set()

    def take(self) -> tuple[list[Entry], list[bytes]]:
        """The next batch in order, at most MAX_CALLS and about MAX_BYTES; its calls count as sent from now on."""
        now = self._loop.time()
        header, bodies = self._header, self._bodies
        count = _fitting(bodies)
        if count == len(bodies):
            self._header, self._bodies = [], []
            self.ready.clear()
        else:
            self._header, self._bodies = header[count:], bodies[count:]
            header, bodies = header[:count], bodies[:count]
        if header:
            if next(iter(self._pending), header[0][0]) >= header[0][0]:  # nothing older waits: the clock starts anew
                self.last_answer = now
                self._sent.clear()
            self._sent.append((header[0][0], now))
            self._last_taken = header[-1][0]
            self._batches += 1
        return header, bodies

    def settle(self, answers: Iterable[Answer]) -> list[Answer]:
        """Give waiting calls their answers; what is left over: other statuses, and answers nobody waits for."""
        pending = self._pending
        left: list[Answer] = []
        for answer in answers:
            number, status, reward, done, body = answer
            if status != _OK or number > self._last_taken or (waiting := pending.pop(number, None)) is None:
                left.append(answer)
                continue
            future = waiting[0]
            if not future.done():
                future.set_result(Observation(body, reward, done))
        self.last_answer = self._loop.time()
        return left

    def refuse(self, number: int, error: Callable[[str], Exception]) -> bool:
        """Fail a waiting call with `error(stage)`. False: no such call waits, the peer broke the protocol."""
        if number > self._last_taken or (waiting := self._pending.pop(number, None)) is None:
            return False
        future, op = waiting
        if not future.done():
            future.set_exception(error(_STAGES.get(op, "call")))
        return True

    def fail(self, failure: Failure) -> None:
        """The sandbox is lost: calls already sent are suspects, calls still queued are not. Idempotent."""
        if self._failure is not None:
            return
        self._failure = failure
        for number, (future, op) in self._pending.items():
            if not future.done():
                at = Failure(failure.kind, _STAGES.get(op, "call"), failure.message)
                future.set_exception(SandboxLost(at, suspect=number <= self._last_taken))
        self._pending.clear()
        self._header, self._bodies = [], []

    def overdue(self, now: float, limit_s: float) -> Failure | None:
        """Whether nothing has been answered for `limit_s`, or the oldest call is four times older than that.

        A sandbox works through its calls one by one, so a call may wait behind many others: what counts is progress.
        The second rule catches a peer that answers others and never this one.
        """
        oldest = self.oldest
        if oldest is None:
            return None
        idle = now - max(oldest, self.last_answer)
        if idle > limit_s:
            return Failure(FailureKind.SANDBOX_HUNG, "call", f"no answer for {idle:.1f} s (limit {limit_s:g} s)")
        if now - oldest > 4 * limit_s:
            return Failure(FailureKind.SANDBOX_HUNG, "call", f"a call was left unanswered for {now - oldest:.1f} s")
        return None

    @property
    def oldest(self) -> float | None:
        """When the oldest call that was sent and has no answer was sent, or None."""
        first = next(iter(self._pending), None)
        if first is None or first > self._last_taken:
            return None
        sent = self._sent
        while len(sent) > 1 and sent[1][0] <= first:
            sent.popleft()
        return sent[0][1]

    @property
    def busy(self) -> bool:
        """Whether any call waits for an answer."""
        return bool(self._pending)

    def statistics(self) -> BatcherStatistics:
        """Counts; cheap."""
        return BatcherStatistics(len(self._header), len(self._pending), self._next_id - 1, self._batches)

    def __repr__(self) -> str:
        queued, pending, calls, batches = self.statistics()
        return f"<Batcher queued={queued} pending={pending} calls={calls} batches={batches}>"


def _fitting(bodies: list[bytes]) -> int:
    """How many of the bodies one batch takes: at least one."""
    size = 0
    for count, body in enumerate(bodies[:MAX_CALLS], 1):
        size += len(body)
        if size >= MAX_BYTES:
            return count
    return min(len(bodies), MAX_CALLS)

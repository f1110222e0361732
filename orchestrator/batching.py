"""Coalesces the calls of all episodes on one sandbox: what is asked for in one turn of the loop leaves in one batch.

Owns the calls that wait to be sent and those that wait for an answer. Always true: a call is in exactly one of `queued`
and `pending` until its future is done; ids only grow; after `fail` both are empty and every further call fails at once.
The connection's sender waits on `ready`, sends what `take` returns, and hands each reply to `answer` or `refuse`.
No task, timer or timeout object per call: deadlines are one look at the oldest pending call (`oldest`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import SandboxLost
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.types import Observation

MAX_CALLS: Final = 1024
MAX_BYTES: Final = 1024 * 1024

_STAGES: Final = {1: "open", 2: "step", 3: "evaluate", 4: "close"}


class QueuedCall(NamedTuple):
    """A call on its way out. `future` is None where no answer is expected."""

    id: int
    op: int
    session: int
    seq: int
    body: bytes
    future: asyncio.Future[Observation] | None


class BatcherStatistics(NamedTuple):
    """Counts since the start; `queued` and `pending` are now."""

    queued: int
    pending: int
    calls: int
    batches: int


class Batcher:
    """One sandbox's calls. Bound to the running loop; used from it alone."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queued: deque[QueuedCall] = deque()
        self._pending: dict[int, QueuedCall] = {}
        self._sent: deque[tuple[int, float]] = deque()
        """First id and time of each batch that may have pending calls, oldest first."""
        self._next_id = 1
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
        self._queued.append(QueuedCall(number, op, session, seq, body, future))
        if not self.ready.is_set():
            self.ready.set()
        return future

    def post(self, op: int, session: int, seq: int) -> None:
        """Queue a call that nobody waits for."""
        if self._failure is None:
            number = self._next_id
            self._next_id = number + 1
            self._queued.append(QueuedCall(number, op, session, seq, b"", None))
            self.ready.set()

    def take(self) -> list[QueuedCall]:
        """The next batch, at most MAX_CALLS and about MAX_BYTES; its calls are pending from now on."""
        now = self._loop.time()
        queued, pending = self._queued, self._pending
        if not pending:
            self.last_answer = now
            self._sent.clear()
        if queued:
            self._sent.append((queued[0].id, now))
        batch: list[QueuedCall] = []
        size = 0
        while queued and len(batch) < MAX_CALLS and size < MAX_BYTES:
            call = queued.popleft()
            batch.append(call)
            size += len(call.body)
            if call.future is not None:
                pending[call.id] = call
        if not queued:
            self.ready.clear()
        self._batches += 1
        return batch

    def answer(self, number: int, answered: Observation) -> bool:
        """Give a waiting call its answer. False: no such call waits, the peer broke the protocol."""
        call = self._pending.pop(number, None)
        if call is None or call.future is None:
            return False
        if not call.future.done():
            call.future.set_result(answered)
        return True

    def refuse(self, number: int, error: Callable[[str], Exception]) -> bool:
        """Fail a waiting call with `error(stage)`. False: no such call waits."""
        call = self._pending.pop(number, None)
        if call is None or call.future is None:
            return False
        if not call.future.done():
            call.future.set_exception(error(_STAGES.get(call.op, "call")))
        return True

    def fail(self, failure: Failure) -> None:
        """The sandbox is lost: calls already sent are suspects, calls still queued are not. Idempotent."""
        if self._failure is not None:
            return
        self._failure = failure
        for call in self._pending.values():
            if call.future is not None and not call.future.done():
                stage = _STAGES.get(call.op, "call")
                lost = SandboxLost(Failure(failure.kind, stage, failure.message), suspect=True)
                call.future.set_exception(lost)
        for call in self._queued:
            if call.future is not None and not call.future.done():
                call.future.set_exception(SandboxLost(failure, suspect=False))
        self._pending.clear()
        self._queued.clear()

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
        """When the oldest pending call was sent, or None."""
        first = next(iter(self._pending), None)
        if first is None:
            return None
        sent = self._sent
        while len(sent) > 1 and sent[1][0] <= first:
            sent.popleft()
        return sent[0][1]

    def statistics(self) -> BatcherStatistics:
        """Counts; cheap."""
        return BatcherStatistics(len(self._queued), len(self._pending), self._next_id - 1, self._batches)

    def __repr__(self) -> str:
        queued, pending, calls, batches = self.statistics()
        return f"<Batcher queued={queued} pending={pending} calls={calls} batches={batches}>"

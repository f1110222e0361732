"""The one thread that writes results.

It owns the writing connection from its start to its end, and takes from a queue that the event loop appends to. What
is always true: rows are committed in the order they were handed over; a row leaves memory only after its commit; a
job runs after all rows handed over before it. A failed commit changes nothing: the same batch is tried again until it
goes in or the writer is closed. A lone row is committed at once; under load the commits keep a short distance, which
makes them fewer and larger. Called by `Store` alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from orchestrator.errors import StoreError
from orchestrator.store.commit import BATCH_ROWS, Committer, Row
from orchestrator.store.schema import explained, immediate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import apsw

    from orchestrator.types import EpisodeKey

BATCH_BYTES: Final = 8 * 1024 * 1024
"""A batch ends at this many bytes of buffers, so that no transaction holds the lock for long."""
PAUSE_S: Final = 0.05
"""The least time from one commit to the next, unless a whole batch, a job or the end is waiting."""
RETRY_S: Final = 0.5

T = TypeVar("T")


class Job(NamedTuple):
    """Something else to do on the writing connection, in a transaction of its own."""

    after: int
    """How many rows must be durable before it may run."""
    run: Callable[[apsw.Connection], Any]
    done: asyncio.Future[Any]


class WriterStatistics(NamedTuple):
    """Counts since the start; `backlog` is rows handed over and not yet durable."""

    backlog: int
    rows: int
    commits: int
    failures: int


class Writer:
    """The event loop's handle on the writing thread. All public methods are called in the event loop."""

    def __init__(self, committer: Committer) -> None:
        self.on_commit: Callable[[Sequence[EpisodeKey], Sequence[int]], None] | None = None
        self.on_error: Callable[[StoreError], None] | None = None
        self._committer = committer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()
        self._wake = threading.Event()
        # The loop appends, the thread takes; each count has one writer. So nothing here needs a lock.
        self._rows: deque[Row] = deque()
        self._toolsets: deque[Mapping[str, bytes]] = deque()
        self._jobs: deque[Job] = deque()
        self._rows_in = 0
        self._closing = False
        # Written by the thread alone.
        self._idle = False
        self._batch: list[Row] = []
        self._batch_toolsets: dict[str, bytes] = {}
        self._rows_out = 0
        self._commits = 0
        self._failures = 0
        self._error: StoreError | None = None
        self._last_commit = 0.0

    @property
    def backlog(self) -> int:
        """Rows handed over and not yet durable."""
        return self._rows_in - self._rows_out

    def statistics(self) -> WriterStatistics:
        """Counts since the start."""
        return WriterStatistics(self.backlog, self._rows_out, self._commits, self._failures)

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)
            self._thread.start()

    def put(self, row: Row) -> None:
        """Hand a row over, without waiting."""
        self._rows.append(row)
        self._rows_in += 1
        if self._idle or len(self._rows) == BATCH_ROWS:
            self._wake.set()

    def put_toolsets(self, toolsets: Mapping[str, bytes]) -> None:
        """Hand tool sets over: they go in before, or with, every row handed over later."""
        self._toolsets.append(toolsets)
        if self._idle:
            self._wake.set()

    async def submit(self, run: Callable[[apsw.Connection], T]) -> T:
        """Run a job behind all rows handed over so far. Raises StoreError, also where those rows cannot be stored.

        Cancelled: the job still runs.
        """
        self.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.append(Job(self._rows_in, run, future))
        self._wake.set()
        return await future

    async def close(self, deadline_s: float) -> None:
        """Write what is left, end the thread, close the connection. Raises StoreError where rows stay unwritten.

        Cancelled: the thread goes on to its end by itself. Called again: waits for the same end.
        """
        self._closing = True
        if self._thread is None:
            self._committer.connection.close()
            return
        self._wake.set()
        try:
            async with asyncio.timeout(deadline_s):
                await self._ended.wait()
        except TimeoutError:
            raise StoreError(
                f"{self._committer.path} took no writes for {deadline_s:g} s, {self.backlog} trajectories are not"
                f" stored: check the disk, then run `rollout resume {self._committer.path.parent}`"
            ) from None
        if self.backlog:
            raise StoreError(f"{self.backlog} trajectories are not stored: {self._error}")

    # Everything below runs in the thread.

    def _main(self) -> None:
        try:
            while True:
                last = self._closing  # read before the round: a round that knows of the end sees all that came before
                self._round()
                if last and (self._error is not None or not self._has_work()):
                    return
                self._rest()
        finally:
            self._committer.connection.close()
            self._tell(self._ended.set)

    def _round(self) -> None:
        """Commit one batch, then run the jobs whose turn has come."""
        self._fill()
        due = len(
            self._jobs
        )  # one that comes during this commit must not be told of its failure, but of the next one's
        if self._batch or self._batch_toolsets:
            self._commit()
        while due and (self._error is not None or self._jobs[0].after <= self._rows_out):
            self._run(self._jobs.popleft())
            due -= 1

    def _fill(self) -> None:
        """Complete the batch. Rows before tool sets: so none of these stays behind a row that needs it."""
        batch, rows = self._batch, self._rows
        size = sum(len(row.trajectory.buffer) for row in batch)
        while rows and len(batch) < BATCH_ROWS and size < BATCH_BYTES:
            batch.append(rows.popleft())
            size += len(batch[-1].trajectory.buffer)
        while self._toolsets:
            self._batch_toolsets.update(self._toolsets.popleft())

    def _commit(self) -> None:
        try:
            committed = self._committer.commit(self._batch, self._batch_toolsets)
        except StoreError as error:
            self._failures += 1
            if self._error is None and self.on_error is not None:
                self._tell(self.on_error, error)
            self._error = error
            return
        self._error = None
        self._commits += 1
        self._rows_out += len(self._batch)
        self._last_commit = time.monotonic()
        if self._batch and self.on_commit is not None:
            self._tell(self.on_commit, committed.keys, committed.seqs)
        self._batch = []
        self._batch_toolsets = {}

    def _run(self, job: Job) -> None:
        if self._error is not None:
            self._tell(_fail, job.done, self._error)
            return
        connection = self._committer.connection
        try:
            with explained(self._committer.path), immediate(connection):
                result = job.run(connection)
        except StoreError as error:
            self._tell(_fail, job.done, error)
        else:
            self._tell(_succeed, job.done, result)

    def _rest(self) -> None:
        """Wait until there is something worth doing."""
        self._wake.clear()
        if self._error is not None and not self._hurried():
            self._wake.wait(RETRY_S)
            return
        if not self._has_work():
            self._idle = True
            if not self._has_work() and not self._closing:
                self._wake.wait()
            self._idle = False
            self._wake.clear()
        pause = self._last_commit + PAUSE_S - time.monotonic()
        if pause > 0 and not self._hurried() and len(self._rows) < BATCH_ROWS:
            self._wake.wait(pause)

    def _has_work(self) -> bool:
        return bool(self._rows or self._batch or self._toolsets or self._batch_toolsets or self._jobs)

    def _hurried(self) -> bool:
        return self._closing or bool(self._jobs)

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to be told


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: StoreError) -> None:
    if not future.done():
        future.set_exception(error)

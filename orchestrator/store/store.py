"""The orchestrator's side of the store: hands results to the writing thread, reads on another.

Exactly one live `Store` may write to a run (the run directory's lock sees to it); one of an older run epoch is
refused by the file itself. `put` never waits: `backlog` is what the caller must bound. Nothing here blocks the event
loop but `create` and `load`, which open files.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import orjson

from orchestrator.errors import StoreError
from orchestrator.store import schema
from orchestrator.store.commit import Committer, Row
from orchestrator.store.reader import StoreReader
from orchestrator.store.writer import Writer, WriterStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import apsw

    from orchestrator.store.values import CommittedEpisode, RunMeta, Totals
    from orchestrator.types import EpisodeKey, GroupRelease, Trajectory

CLOSE_S: Final = 30.0

T = TypeVar("T")


class Store:
    """Made by `create` or `load`; `start` before the first `put`; `close` in any case."""

    def __init__(self, path: Path, connection: apsw.Connection) -> None:
        """Use `create` or `load`."""
        self.path = path
        self._reader = StoreReader(path)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._committer = Committer(connection, path, self._reader.run_epoch)
        self._writer = Writer(self._committer)
        self._known_toolsets: set[str] = set()
        self._closed = False
        self.meta: RunMeta = self._reader.meta
        self.state: Literal["running", "finished"] = self._reader.state
        self.summary: Mapping[str, Any] | None = self._reader.summary

    @classmethod
    def create(cls, path: Path, meta: RunMeta) -> Store:
        """Make the store of a new run. Raises RunExists where there is one, SchemaMismatch, StoreError."""
        return cls(path, schema.create(path, meta))

    @classmethod
    def load(cls, path: Path) -> Store:
        """Open the store of an existing run. Raises UsageError where there is none, SchemaMismatch, StoreError."""
        return cls(path, schema.open_writer(path))

    @property
    def run_epoch(self) -> int:
        """The epoch that this store writes in."""
        return self._committer.run_epoch

    @property
    def backlog(self) -> int:
        """Trajectories handed over and not yet durable."""
        return self._writer.backlog

    def statistics(self) -> WriterStatistics:
        """What the writing thread has done."""
        return self._writer.statistics()

    def __repr__(self) -> str:
        return f"<Store {self.path} epoch {self.run_epoch} {self.state} {self.statistics()}>"

    async def start(
        self,
        on_commit: Callable[[Sequence[EpisodeKey], Sequence[int]], None],
        on_error: Callable[[StoreError], None],
    ) -> None:
        """Start writing. Both are called in the event loop that called this.

        `on_commit` once a commit, with the keys that it made durable and the outbox numbers of the groups that it
        released. `on_error` once when commits begin to fail: what was handed over stays in memory and is tried again.
        """
        self._writer.on_commit = on_commit
        self._writer.on_error = on_error
        self._writer.start()

    def put(self, trajectory: Trajectory, release: GroupRelease | None) -> None:
        """Hand a trajectory over, with the group that it completes. Does not wait; stored in this order."""
        self._writer.put(Row(trajectory, release))

    def put_toolsets(self, toolsets: Mapping[str, bytes]) -> None:
        """Hand tool sets over, durable before or with any later trajectory. Cheap for those handed over before."""
        new = {digest: body for digest, body in toolsets.items() if digest not in self._known_toolsets}
        if new:
            self._known_toolsets |= new.keys()
            self._writer.put_toolsets(new)

    async def flush(self) -> None:
        """Wait until all that was handed over is durable. Raises StoreError where it cannot be stored."""
        await self._writer.submit(lambda connection: None)

    async def raise_epoch(self) -> int:
        """Begin a new epoch, which every resume does before its first `put`; older stores are refused from here on."""

        def raise_it(connection: apsw.Connection) -> int:
            sql = "UPDATE run SET run_epoch = run_epoch + 1 WHERE run_epoch = ? RETURNING run_epoch"
            return self._own(connection, sql, self.run_epoch)

        epoch = await self._writer.submit(raise_it)
        self._committer.run_epoch = epoch
        return epoch

    async def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished, behind all that was handed over; `summary` is any JSON object."""
        text = orjson.dumps(summary).decode()

        def finish(connection: apsw.Connection) -> None:
            sql = "UPDATE run SET state = 'finished', summary = ? WHERE run_epoch = ? RETURNING run_epoch"
            self._own(connection, sql, text, self.run_epoch)

        await self._writer.submit(finish)
        self.state, self.summary = "finished", summary

    async def save_plan(self, plan: Mapping[str, Any]) -> None:
        """Store the resolved plan, any JSON object."""
        text = orjson.dumps(plan).decode()

        def save(connection: apsw.Connection) -> None:
            self._own(
                connection, "UPDATE run SET plan = ? WHERE run_epoch = ? RETURNING run_epoch", text, self.run_epoch
            )

        await self._writer.submit(save)

    async def load_plan(self) -> dict[str, Any] | None:
        """The plan, or None while none was saved."""
        return await self._read(lambda: self._reader.plan)

    async def committed(self) -> dict[EpisodeKey, CommittedEpisode]:
        """Every stored key, and how it ended."""
        return await self._read(self._reader.committed)

    async def open_groups(self) -> dict[tuple[str, int], list[EpisodeKey]]:
        """The stored keys of every group that has some and is not released."""
        return await self._read(self._reader.open_groups)

    async def toolsets(self) -> dict[str, bytes]:
        """All stored tool sets by digest."""
        return await self._read(self._reader.toolsets)

    async def unacked(self, consumer: str) -> int:
        """How many released groups this consumer has not acknowledged. Cheap: it does not grow with the run."""
        return await self._read(lambda: self._reader.unacked(consumer))

    async def totals(self) -> Totals:
        """Sums over all that is stored."""
        return await self._read(self._reader.totals)

    async def close(self, deadline_s: float = CLOSE_S) -> None:
        """Store what is left and end both threads. Idempotent. Raises StoreError where something stays unstored.

        Cancelled: the writing thread goes on to its end by itself.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await asyncio.get_running_loop().run_in_executor(self._reading, self._reader.close)
        finally:
            self._reading.shutdown(wait=False)
            await self._writer.close(deadline_s)

    async def _read(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, function)

    def _own(self, connection: apsw.Connection, sql: str, *values: Any) -> int:
        """Change the run's row, if it is still ours."""
        epoch = connection.execute(sql, values).get
        if epoch is None:
            raise StoreError(f"another process has resumed the run in {self.path.parent}: this one may not go on")
        return int(epoch)

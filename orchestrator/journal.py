"""The step journal: what each episode in flight has gained, so that a kill of the orchestrator repeats no model call.

It owns the journal folder of a run and one thread. `touch` marks a buffer; every interval the event loop copies what
the marked buffers gained, and the thread writes and syncs it as one append. What is always true:

1. One append is on its way at a time; while it is, buffers only grow, so a slow disk stretches the interval and costs
   no memory of its own. A failed append is tried again, as it was, before anything newer.
2. The pieces of an attempt are appended in order and without a gap, each exactly once.
3. A segment is deleted only when no live attempt has a piece in it. An attempt lives from its first `touch` until
   `forget`, or until a newer attempt of its key is touched.

Called by the engine and its episodes, in the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator import segments
from orchestrator.errors import StoreError
from orchestrator.segments import Piece, SegmentWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from orchestrator.records import EpisodeBuffer
    from orchestrator.types import EpisodeKey

INTERVAL_S: Final = 0.1
SEGMENT_BYTES: Final = 64 * 1024 * 1024


class JournalStatistics(NamedTuple):
    """Where the journal stands: live and dirty attempts, segments kept; appends, their bytes and failures so far."""

    live: int
    dirty: int
    segments: int
    appends: int
    bytes: int
    failures: int


class _Track:
    """A live attempt, and the segments that hold pieces of it."""

    __slots__ = ("attempt", "buffer", "key", "segments")

    def __init__(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> None:
        self.key = key
        self.attempt = attempt
        self.buffer = buffer
        self.segments: list[int] = []


class _Append(NamedTuple):
    segment: int
    pieces: list[Piece]
    doomed: list[int]


class Journal:
    """Made, `start`ed, `adopt` where a run resumes, then touched and told what to forget until `close`."""

    def __init__(
        self,
        folder: Path,
        run_epoch: int,
        *,
        interval_s: float = INTERVAL_S,
        segment_bytes: int = SEGMENT_BYTES,
        on_error: Callable[[StoreError], None],
    ) -> None:
        """`on_error` is called in the event loop when appends begin to fail; nothing is lost while memory lasts."""
        self._folder = folder
        self._run_epoch = run_epoch
        self._interval_s = interval_s
        self._segment_bytes = segment_bytes
        self._on_error = on_error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writer = SegmentWriter(folder)
        self._tracks: dict[EpisodeBuffer, _Track] = {}
        self._live: dict[EpisodeKey, _Track] = {}
        self._dirty: dict[_Track, None] = {}
        self._segment = 1
        self._pieces_in: Counter[int] = Counter()
        """Segment -> live attempts with pieces in it."""
        self._doomed: list[int] = []
        self._flight: asyncio.Future[int] | None = None
        self._sent: _Append | None = None
        """The append on its way, or the one that failed and comes first next time."""
        self._timer: asyncio.TimerHandle | None = None
        self._pending = True
        """Whether a flush is certain to come: the timer runs or an append is on its way. True before the start."""
        self._error: StoreError | None = None
        self._closed = False
        self._appends = self._bytes = self._failures = 0

    def statistics(self) -> JournalStatistics:
        """Where the journal stands."""
        kept = sum(1 for count in self._pieces_in.values() if count)
        return JournalStatistics(len(self._live), len(self._dirty), kept, self._appends, self._bytes, self._failures)

    def __repr__(self) -> str:
        return f"<Journal {self._folder} {self.statistics()}>"

    @staticmethod
    def load(folder: Path) -> dict[EpisodeKey, tuple[int, bytes]]:
        """What a folder holds: key -> (newest attempt, its buffer as far as it is whole). Raises SchemaMismatch.

        Keys that were committed since are among them. Blocks on the disk: in an event loop it belongs on a thread.
        """
        return segments.recover(folder)

    def start(self) -> None:
        """Begin to flush. What earlier lives of the run left stays until `adopt`."""
        self._pending = False
        if self._dirty:
            self._arm()

    async def adopt(self, episodes: Mapping[EpisodeKey, tuple[int, EpisodeBuffer]]) -> None:
        """Take over the attempts that go on, and delete what earlier lives of the run left. Raises StoreError.

        `episodes`: key -> (attempt, restored buffer). Their bytes are durable in new segments before an old one is
        deleted: a kill at any moment loses nothing. A run that starts anew adopts nothing, which clears the folder.
        """
        for key, (attempt, buffer) in episodes.items():
            self.touch(key, attempt, buffer)
        await self.flush()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.clear)
        except OSError as error:
            raise self._explain(error) from error

    def touch(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> None:
        """This attempt's buffer has grown: its new bytes go out with the next flush. Constant time."""
        track = self._tracks.get(buffer)
        if track is None:
            track = self._begin(key, attempt, buffer)
            if track is None:
                return
        self._dirty[track] = None
        if not self._pending:
            self._arm()

    def forget(self, key: EpisodeKey) -> None:
        """The episode is committed: nothing of it is needed any more. Unknown keys are fine."""
        track = self._live.pop(key, None)
        if track is not None:
            self._drop(track)

    async def flush(self) -> None:
        """Wait until all that was touched before is durable. Raises StoreError when an append fails.

        Cancelled: the append goes on.
        """
        for _ in range(2):  # what is on its way, then what is left: not more, or a busy run would hold us for ever
            if self._flight is None:
                self._send()
            if self._flight is not None:
                await asyncio.wait({self._flight})
            if self._error is not None:
                raise self._error

    async def close(self) -> None:
        """Flush, end the thread, and delete the segments that nobody needs. Idempotent. Raises StoreError."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.flush()
        finally:
            self._pending = True  # whatever comes now is too late to be flushed
            if self._timer is not None:
                self._timer.cancel()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
            self._thread.shutdown(wait=False)

    def _begin(self, key: EpisodeKey, attempt: int, buffer: EpisodeBuffer) -> _Track | None:
        older = self._live.get(key)
        if older is not None:
            if older.attempt > attempt:
                return None
            self._drop(older)
        track = _Track(key, attempt, buffer)
        buffer.flushed = 0
        self._live[key] = self._tracks[buffer] = track
        return track

    def _drop(self, track: _Track) -> None:
        del self._tracks[track.buffer]
        self._dirty.pop(track, None)
        for segment in track.segments:
            self._pieces_in[segment] -= 1
            self._doom_if_unused(segment)

    def _doom_if_unused(self, segment: int) -> None:
        if segment != self._segment and not self._pieces_in[segment]:
            del self._pieces_in[segment]
            self._doomed.append(segment)
            if not self._pending:
                self._arm()

    def _arm(self) -> None:
        self._pending = True
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._flight is None:
            self._send()

    def _send(self) -> None:
        """Put the next append on its way, if there is anything to do."""
        if self._sent is None:
            pieces = self._collect()
            doomed, self._doomed = self._doomed, []
            if not pieces and not doomed:
                self._pending = self._timer is not None
                return
            self._sent = _Append(self._segment, pieces, doomed)
        self._pending = True
        self._flight = asyncio.get_running_loop().run_in_executor(self._thread, self._write, self._sent)
        self._flight.add_done_callback(self._landed)

    def _collect(self) -> list[Piece]:
        """Copy what the dirty buffers gained. A copy, for a bytearray cannot grow while a view of it exists."""
        pieces: list[Piece] = []
        segment = self._segment
        for track in self._dirty:
            buffer = track.buffer
            start, end = buffer.flushed, len(buffer.data)
            if end > start:
                pieces.append(Piece(track.key, track.attempt, start, buffer.data[start:]))
                buffer.flushed = end
                if not track.segments or track.segments[-1] != segment:
                    track.segments.append(segment)
                    self._pieces_in[segment] += 1
        self._dirty.clear()
        return pieces

    def _write(self, append: _Append) -> int:
        """In the thread: make an append durable; returns the segment's size."""
        size = 0
        if append.pieces:
            body = segments.encode(self._run_epoch, append.pieces)
            size = self._writer.append(append.segment, body)
            self._bytes += len(body)
        self._writer.delete(append.doomed)
        return size

    def _landed(self, flight: asyncio.Future[int]) -> None:
        """An append has ended, well or not."""
        self._flight = None
        error = flight.exception()
        if error is None:
            self._sent, self._error = None, None
            self._appends += 1
            if flight.result() >= self._segment_bytes:
                full, self._segment = self._segment, self._segment + 1
                self._doom_if_unused(full)
        else:
            self._report(error)
        self._pending = self._timer is not None
        if not self._pending and (self._sent is not None or self._dirty or self._doomed):
            self._arm()

    def _report(self, error: BaseException) -> None:
        self._failures += 1
        first = self._error is None
        self._error = self._explain(error)
        if first:
            self._on_error(self._error)

    def _explain(self, error: BaseException) -> StoreError:
        return StoreError(
            f"the step journal in {self._folder} cannot be written ({error}): free some space or check the disk, then"
            f" run `rollout resume {self._folder.parent}`"
        )

    def _end(self) -> None:
        """In the thread: close, and delete what no live attempt needs."""
        self._writer.close()
        if not self._live:
            self._writer.delete([*self._pieces_in, *self._doomed])

"""A queue that is a file: one line of JSON a group, for trainers that read files and for people.

Always true: a group is in the file once, however often it is delivered, across restarts too; a line is whole and
synced before `deliver` returns. A last line that a kill cut short is removed when the file is opened again. One
process writes to a file at a time. The disk is the backpressure.

    {"seq", "task", "group", "partial", "trajectories": [{"key", "attempt", "outcome", "stop_reason", "reward",
     "steps", "prompt_tokens", "completion_tokens", "failure", "details", "messages"}]}

An episode of several conversations has `conversations` too: where in its messages each of them begins.
Tools are not repeated in every line: the run directory holds each set once (`rollout export --format openai`).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from orchestrator.errors import RunBusy, StoreError, UsageError
from orchestrator.records import ConversationView, EpisodeBuffer

if TYPE_CHECKING:
    from orchestrator.types import Group, Trajectory


class JsonlStatistics(NamedTuple):
    """`groups` are in the file; `repeated` deliveries were of groups that were there before."""

    groups: int
    repeated: int
    bytes: int


class JsonlQueue:
    """A `TrainerQueue`. The file is opened at the first delivery; an async context manager closes it."""

    def __init__(self, path: str | os.PathLike[str], *, name: str = "jsonl") -> None:
        self.name = name
        self.path = Path(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jsonl-queue")
        # Below: the thread's own, so that an interrupted delivery and the next one never cross.
        self._file = -1
        self._size = 0
        self._seen: set[tuple[str, int]] = set()
        self._repeated = 0

    def statistics(self) -> JsonlStatistics:
        """Counts so far."""
        return JsonlStatistics(len(self._seen), self._repeated, self._size)

    def __repr__(self) -> str:
        return f"<JsonlQueue {self.path} {self.statistics()}>"

    async def __aenter__(self) -> JsonlQueue:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def deliver(self, group: Group) -> None:
        """Append a group. Raises StoreError when the disk refuses, UsageError when the file is no queue's.

        Cancelled: the line may still be written; delivering again does not repeat it.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._append, group)

    async def close(self) -> None:
        """Close the file. A later delivery opens it again."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._release)

    # Below: in the thread.

    def _append(self, group: Group) -> None:
        if self._file < 0:
            self._open()
        key = (group.task, group.group)
        if key in self._seen:
            self._repeated += 1
            return
        line = orjson.dumps(_row(group)) + b"\n"
        try:
            _write_at(self._file, line, self._size)
            os.fdatasync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise StoreError(
                f"{self.path} cannot be written ({error.strerror}): free some space or check the disk, then resume"
            ) from error
        self._size += len(line)
        self._seen.add(key)

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be opened ({error.strerror}): choose another file") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = self._read_back(file)
        except BlockingIOError:
            os.close(file)
            raise RunBusy(f"{self.path} is being written by another process: choose another file") from None
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _read_back(self, file: int) -> int:
        """Learn which groups are there, cut a torn last line, and return the size of the rest."""
        size = 0
        with open(file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = orjson.loads(line)
                    self._seen.add((row["task"], row["group"]))
                except (orjson.JSONDecodeError, KeyError, TypeError):
                    raise UsageError(
                        f"{self.path}, line {number}: not a group; choose another file, or remove the line"
                    ) from None
                size += len(line)
        os.ftruncate(file, size)
        return size

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _row(group: Group) -> dict[str, Any]:
    return {
        "seq": group.seq,
        "task": group.task,
        "group": group.group,
        "partial": group.partial,
        "trajectories": [_episode(trajectory) for trajectory in group.trajectories],
    }


def _episode(trajectory: Trajectory) -> dict[str, Any]:
    view = ConversationView(EpisodeBuffer.restore(trajectory.buffer), {}, whole=True)
    row = {
        "key": str(trajectory.key),
        "attempt": trajectory.attempt,
        "outcome": trajectory.outcome,
        "stop_reason": trajectory.stop_reason,
        "reward": trajectory.reward,
        "steps": trajectory.steps,
        "prompt_tokens": trajectory.prompt_tokens,
        "completion_tokens": trajectory.completion_tokens,
        "failure": trajectory.failure,
        "details": orjson.Fragment(trajectory.details),
        "messages": orjson.Fragment(view.joined_json()),
    }
    if len(beginnings := view.beginnings()) > 1:
        row["conversations"] = beginnings
    return row


def _write_at(file: int, body: bytes, offset: int) -> None:
    view = memoryview(body)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written

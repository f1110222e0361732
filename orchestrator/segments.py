"""The files of the step journal: numbered segments of checked records, written at known places and read to the tear.

A segment is MAGIC, a version, and records:

    crc u32, length u32, task length u16, run epoch u32, attempt u32, group u32, sample u32, offset u64, task, bytes

little-endian; the CRC-32 covers all behind it. A record says: the buffer of this attempt has these bytes at this
offset. The first record that is cut short or fails its CRC ends its segment: nothing behind it can be trusted.
`SegmentWriter` is used by one thread; `read` by whoever recovers, with no writer alive.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple
from zlib import crc32

from orchestrator.errors import SchemaMismatch
from orchestrator.types import EpisodeKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAGIC: Final = b"RLOJ"
VERSION: Final = 1

_FILE = struct.Struct("<4sH")
_CRC = struct.Struct("<I")
_HEAD = struct.Struct("<IHIIIIQ")
_FILE_HEADER: Final = _FILE.pack(MAGIC, VERSION)


class Piece(NamedTuple):
    """Bytes that the buffer of one attempt holds at `offset`."""

    key: EpisodeKey
    attempt: int
    offset: int
    data: bytes | bytearray


class Record(NamedTuple):
    """A piece as read back, with the run epoch that wrote it."""

    run_epoch: int
    piece: Piece


def name(number: int) -> str:
    """The file name of a segment."""
    return f"{number:08d}.seg"


def numbers(folder: Path) -> list[int]:
    """The segments in a folder, oldest first; none where it is missing."""
    if not folder.is_dir():
        return []
    return sorted(int(path.stem) for path in folder.glob("*.seg") if path.stem.isdecimal())


def encode(run_epoch: int, pieces: Sequence[Piece]) -> bytes:
    """The records of some pieces."""
    parts: list[bytes | bytearray] = []
    for key, attempt, offset, data in pieces:
        task = key.task.encode()
        head = _HEAD.pack(len(data), len(task), run_epoch, attempt, key.group, key.sample, offset) + task
        parts += (_CRC.pack(crc32(data, crc32(head))), head, data)
    return b"".join(parts)


def read(path: Path) -> Iterator[Record]:
    """The records of a segment up to its first damage. Raises SchemaMismatch for a file of another version."""
    body = path.read_bytes()
    if len(body) < _FILE.size:
        return  # its writer died before the first flush
    magic, version = _FILE.unpack_from(body)
    if magic != MAGIC or version != VERSION:
        raise SchemaMismatch(
            f"{path} has schema {magic!r}/{version}, this version reads {MAGIC!r}/{VERSION}: use the one that wrote it"
        )
    start = _FILE.size
    while start + _CRC.size + _HEAD.size <= len(body):
        begin = start + _CRC.size
        length, task_length, run_epoch, attempt, group, sample, offset = _HEAD.unpack_from(body, begin)
        middle = begin + _HEAD.size + task_length
        end = middle + length
        if end > len(body) or crc32(memoryview(body)[begin:end]) != _CRC.unpack_from(body, start)[0]:
            return
        task = body[begin + _HEAD.size : middle].decode()
        yield Record(run_epoch, Piece(EpisodeKey(task, group, sample), attempt, offset, body[middle:end]))
        start = end


def recover(folder: Path) -> dict[EpisodeKey, tuple[int, bytes]]:
    """key -> (newest attempt, its buffer up to the first gap), from all segments of a folder. Raises SchemaMismatch."""
    found: dict[EpisodeKey, _Recovered] = {}
    for number in numbers(folder):
        for record in read(folder / name(number)):
            found.setdefault(record.piece.key, _Recovered()).add(record)
    return {key: (one.attempt, bytes(one.data)) for key, one in found.items() if one.data}


class _Recovered:
    """The newest attempt of one key, put together from its records in the order they were written."""

    __slots__ = ("attempt", "data", "run_epoch", "whole")

    def __init__(self) -> None:
        self.attempt = -1
        self.run_epoch = -1
        self.data = bytearray()
        self.whole = True

    def add(self, record: Record) -> None:
        """Add a record. One at offset 0 begins anew: a newer attempt, or the same one rewritten by a later epoch."""
        run_epoch, piece = record
        if piece.offset == 0 and (piece.attempt, run_epoch) >= (self.attempt, self.run_epoch):
            self.attempt, self.run_epoch = piece.attempt, run_epoch
            self.data = bytearray(piece.data)
            self.whole = True
        elif (piece.attempt, run_epoch) == (self.attempt, self.run_epoch):
            self.whole = self.whole and piece.offset == len(self.data)
            if self.whole:
                self.data += piece.data


class SegmentWriter:
    """Appends to one segment at a time. What a failed append has left is overwritten by the next one.

    Its numbers count from 1 behind the segments that it finds, which are the inheritance of earlier writers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inherited: list[int] | None = None
        self._behind = 0
        self._file = -1
        self._number = -1
        self._size = 0

    def append(self, number: int, body: bytes) -> int:
        """Make `body` durable at the end of segment `number`; returns the segment's size. Raises OSError."""
        if number != self._number:
            self._begin(number)
        if self._size == 0:
            body = _FILE_HEADER + body
        # The whole body is written again after a failed sync: the kernel may have dropped what it could not write.
        _write_at(self._file, body, self._size)
        os.fdatasync(self._file)
        if self._size == 0:
            self._sync_folder()
        self._size += len(body)
        return self._size

    def delete(self, doomed: Sequence[int]) -> None:
        """Remove own segments that nobody needs; what is gone already is fine. Raises OSError."""
        for number in doomed:
            (self._folder / name(self._place() + number)).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what earlier writers left. Raises OSError."""
        self._place()
        while self._inherited:
            (self._folder / name(self._inherited[0])).unlink(missing_ok=True)
            self._inherited.pop(0)

    def close(self) -> None:
        """Close the open segment. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = self._number = -1

    def _begin(self, number: int) -> None:
        self.close()
        path = self._folder / name(self._place() + number)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._number, self._size = number, 0

    def _place(self) -> int:
        """The number behind which the own ones count."""
        if self._inherited is None:
            self._inherited = numbers(self._folder)
            self._behind = self._inherited[-1] if self._inherited else 0
        return self._behind

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_at(file: int, body: bytes, offset: int) -> None:
    view = memoryview(body)
    while view:
        written = os.pwrite(file, view, offset)
        view = view[written:]
        offset += written

"""A run's directory: what lies where, and which process owns it.

    DIR/run.sqlite   the store          DIR/logs/   logs of the orchestrator and its sandboxes
    DIR/journal/     steps in flight    DIR/lock    held by flock, names its owner

Ownership is the flock, so it ends with its process however that dies. The owner's record inside the lock file is for
people and for readers, who must not touch the lock; it counts only while the process it names is alive.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from orchestrator.errors import RunBusy, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from any other that has or had its number.

    `boot` is the kernel's boot id and `start` the process's start in clock ticks since then; both are empty (0) where
    the system does not tell them, and then only the number counts.
    """

    boot: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(_boot_id(), pid, _start_of(pid) or 0)

    def alive(self) -> bool:
        """Whether this very process still runs (on this machine, since this boot)."""
        if self.boot != _boot_id():
            return False
        if self.boot and (start := _start_of(self.pid)) is not None:
            return start == self.start
        try:  # a /proc with `hidepid` shows no processes of other users
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
        return True


class RunDirectory:
    """Paths of one run, and its ownership. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.store = self.path / "run.sqlite"
        self.journal = self.path / "journal"
        self.logs = self.path / "logs"
        self.lock = self.path / "lock"

    def __repr__(self) -> str:
        return f"<RunDirectory {self.path}>"

    @contextmanager
    def claim(self) -> Iterator[RunDirectory]:
        """Own the directory, making it first where it is missing. Does not wait.

        Raises RunBusy while another claim is held, by this process too, and UsageError where the path cannot be one.
        """
        try:
            for folder in (self.path, self.journal, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            # Not inherited by children: a sandbox that outlives us must not keep the directory.
            lock = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be a run's directory ({error.strerror}: {error.filename}): choose a writable one"
            ) from error
        try:
            self._take(lock)
            _write(lock, orjson.dumps(Owner.current()))
            try:
                yield self
            finally:
                _write(lock, b"")
                # Said aloud: a child that was just forked has a copy of the descriptor until it has begun its program.
                fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)

    def live_owner(self) -> int | None:
        """The number of the process that owns the directory, or None. Reads only, and never disturbs a claim.

        Sees processes of this machine and of this process's own namespace alone; `claim` sees all.
        """
        owner = self._owner()
        return owner.pid if owner is not None and owner.alive() else None

    def _owner(self) -> Owner | None:
        try:
            return Owner(**orjson.loads(self.lock.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (orjson.JSONDecodeError, TypeError):
            return None  # empty after a release, or half-written by a process that died

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise UsageError(f"{self.path} cannot be locked ({error.strerror}): put it on a local disk") from error
            owner = self._owner()
            who = "another process" if owner is None else f"process {owner.pid}"
            raise RunBusy(
                f"{self.path} is in use by {who}: wait until it ends, stop it, or choose another directory"
            ) from None


def _write(file: int, body: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, body, 0)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; the name in field 2 may hold anything, so it is counted from behind that."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return int(stat.rpartition(b")")[2].split()[19])

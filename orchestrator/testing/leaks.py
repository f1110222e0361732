"""What a test may leave behind, and how to see it: tasks, open files, child processes, servers of a run.

Reads /proc, so files and processes are seen on Linux alone; elsewhere there are none to report. Nothing here changes
anything. `Held.now()` before and after, and `new` names what is left.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import ConformanceError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC: Final = Path("/proc")
SERVER: Final = "backends.server"
"""What every local sandbox server has in its command line."""


class Process(NamedTuple):
    """A process as /proc shows it. `state` is the kernel's letter: Z is a zombie, T is stopped."""

    pid: int
    parent: int
    state: str
    command: str


def processes() -> Iterator[Process]:
    """Every process of this machine (or container) that lives now."""
    for entry in os.listdir(_PROC) if _PROC.is_dir() else ():
        if entry.isdecimal() and (process := _read(int(entry))) is not None:
            yield process


def _read(pid: int) -> Process | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None  # it ended meanwhile
    state, parent = stat.rpartition(")")[2].split()[:2]
    return Process(pid, int(parent), state, command.replace(b"\0", b" ").decode(errors="replace").strip())


def children(parent: int | None = None) -> list[Process]:
    """The direct children of a process (default: this one), zombies included."""
    owner = os.getpid() if parent is None else parent
    known = _children_by_kernel(owner)
    if known is None:
        return [process for process in processes() if process.parent == owner]
    return [process for pid in known if (process := _read(pid)) is not None]


def _children_by_kernel(parent: int) -> list[int] | None:
    """The kernel's own lists, one a thread; None where it keeps none."""
    try:
        lists = [path.read_text(encoding="ascii") for path in (_PROC / str(parent) / "task").glob("*/children")]
    except OSError:
        return None  # a thread ended meanwhile: the long way then
    return [int(pid) for pids in lists for pid in pids.split()] if lists else None


def servers(parent: int | None = None) -> list[Process]:
    """The living sandbox servers among a process's children (default: this one's)."""
    return [child for child in children(parent) if SERVER in child.command and child.state != "Z"]


def labelled(run: str) -> list[Process]:
    """The living servers that carry a run's label, whoever their parent is: none may outlive their owner."""
    return [
        process
        for process in processes()
        if SERVER in process.command and process.state != "Z" and f"--run {run}" in process.command
    ]


def open_files() -> dict[int, str]:
    """The open file descriptors of this process and what each one is."""
    folder = _PROC / "self" / "fd"
    found: dict[int, str] = {}
    for entry in os.listdir(folder) if folder.is_dir() else ():
        try:
            found[int(entry)] = os.readlink(folder / entry)
        except OSError:
            continue  # the descriptor of the listing itself
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds at one moment."""

    files: dict[int, str]
    children: dict[int, str]
    tasks: frozenset[asyncio.Task[object]]

    @classmethod
    def now(cls, tasks: frozenset[asyncio.Task[object]] = frozenset()) -> Held:
        """Look; `tasks` is what `running_tasks` gave, for it can be asked only inside the loop. Blocks on /proc."""
        return cls(open_files(), {child.pid: child.command for child in children()}, tasks)

    def new(self, before: Held, *, sockets: bool = True) -> list[str]:
        """What is held now and was not before, one line each; empty is good. `sockets`: whether those count.

        A library that keeps its own connections in this process (Ray's does) makes them worth nothing as a sign.
        """
        files = [
            f"file {number}: {name}"
            for number, name in self.files.items()
            if before.files.get(number) != name and (sockets or not name.startswith("socket:"))
        ]
        processes = [f"child {pid}: {name}" for pid, name in self.children.items() if pid not in before.children]
        tasks = [f"task {task.get_name()}" for task in self.tasks - before.tasks if not task.done()]
        return files + processes + tasks


def running_tasks() -> frozenset[asyncio.Task[object]]:
    """The unfinished tasks of the running loop."""
    return frozenset(asyncio.all_tasks())


async def look() -> Held:
    """`Held.now` from inside a loop, the running tasks included."""
    return await asyncio.to_thread(Held.now, running_tasks())


async def settled(before: Held, *, within_s: float = 5.0, sockets: bool = True) -> None:
    """Wait until nothing more than `before` is held. Raises ConformanceError with what is left after `within_s`."""
    ends = asyncio.get_running_loop().time() + within_s
    while left := (await look()).new(before, sockets=sockets):
        if asyncio.get_running_loop().time() > ends:
            raise ConformanceError(f"left behind after {within_s:g} s: {'; '.join(left)}")
        await asyncio.sleep(0.02)

"""What the kernel does for a process that has children: their death with its own, adoption, and who they are.

Linux has all of it; elsewhere the calls do nothing and nobody is found.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36
_LINUX: Final = sys.platform == "linux"
_CHILDREN: Final = Path("/proc/thread-self/children")
_PARENT_FIELD: Final = 1
"""Of /proc/PID/stat, counted behind the name."""


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGKILL at the death of `parent`, who forked this process; at once where it is dead."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Take `die_with_parent` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def adopt_orphans() -> None:
    """Descendants whose own parent dies become children of this process, not of the system's first one."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide(*, hidden: bool) -> None:
    """Whether others of the same user are kept from this process's memory and files. Children inherit it."""
    _prctl(_PR_SET_DUMPABLE, 0 if hidden else 1)


def children() -> list[int]:
    """The children of this process, which has one thread; zombies included."""
    try:
        return [int(pid) for pid in _CHILDREN.read_text(encoding="ascii").split()]
    except OSError:
        return [pid for pid in _everybody() if _parent(pid) == os.getpid()]


def kill(pid: int) -> None:
    """SIGKILL to a child and to the process group that it leads, if it does; gone already is success."""
    for send in (os.kill, os.killpg):
        try:
            send(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it leads no group, or the group is that of another: what is its own is found among the orphans


def end_children(known: Iterable[int] = ()) -> None:
    """Kill and bury until no child is left: what a dying one had started is adopted, and found in the next round.

    `known` are children that must be killed where the system names none. Waits for their deaths.
    """
    while True:
        for pid in {*children(), *known}:
            kill(pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()] if _LINUX else []


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[_PARENT_FIELD])

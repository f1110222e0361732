"""What Linux says of processes: who descends from whom, and how much memory is really theirs.

Reads /proc alone. A process that ends while it is looked at counts as gone.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Final

from orchestrator.errors import Unavailable

_PR_SET_CHILD_SUBREAPER: Final = 36
_GONE: Final = (FileNotFoundError, ProcessLookupError)


def need_linux(what: str) -> None:
    """Raises Unavailable elsewhere."""
    if sys.platform != "linux":
        raise Unavailable(f"{what} reads /proc: run it on Linux")


def children(pid: int) -> list[int]:
    """The living direct children of a process, of all its threads."""
    return [child for child in _all_children(pid) if _state(child) not in {"Z", "X", ""}]


def zombies(pid: int) -> list[int]:
    """Direct children that have ended and wait to be reaped."""
    return [child for child in _all_children(pid) if _state(child) == "Z"]


def family(pid: int) -> list[int]:
    """The process and all its living descendants."""
    found = [pid]
    for member in found:
        found += children(member)
    return found


def command(pid: int) -> str:
    """The command line, its arguments joined by spaces; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except _GONE:
        return ""


def servers(pid: int) -> list[int]:
    """The sandbox servers that are direct children of an orchestrator."""
    return [child for child in children(pid) if "backends.server" in command(child)]


def pss_kib(pid: int) -> int:
    """Proportional set size in KiB: private pages, and each shared one divided by its users."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def adopt_orphans(*, adopt: bool) -> None:
    """Whether this process becomes the parent of descendants whose own parent dies; then none can hide."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) != 0:
        raise Unavailable(f"this system refuses to hand orphans over ({os.strerror(ctypes.get_errno())})")


def _all_children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text(encoding="ascii").split())
    except _GONE:
        pass
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except _GONE:
        return ""

"""What a container uses, read from its control group; no call to the daemon, a few small files each time.

Works with both versions of control groups, on the machine that the container runs on. Where the files cannot be seen
(another mount or process namespace) everything reads zero. Figures of a container that has ended are those last read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

_CGROUPS: Final = Path("/sys/fs/cgroup")
_PROC: Final = Path("/proc")


class HostUsage(NamedTuple):
    """How the machine stands: runnable processes over the last minute, cores, memory in all and what can be had."""

    load: float
    cores: int
    memory_bytes: int
    available_bytes: int


def host_usage() -> HostUsage:
    """Look at the machine; two small files."""
    total, available = (_field(_PROC, "meminfo", name) << 10 for name in ("MemTotal:", "MemAvailable:"))
    return HostUsage(os.getloadavg()[0], os.cpu_count() or 1, total, available)


class Usage:
    """Counters of one container, found by its first process's number on this machine."""

    __slots__ = ("_cpu", "_cpu_seconds", "_memory", "_oom_kills", "_unified")

    def __init__(self, pid: int) -> None:
        paths = _paths(pid) if pid else {}
        self._unified = "" in paths and "cpuacct" not in paths
        self._cpu = paths.get("" if self._unified else "cpuacct")
        self._memory = paths.get("" if self._unified else "memory")
        self._cpu_seconds = 0.0
        self._oom_kills = 0

    def cpu_seconds(self) -> float:
        """User + system CPU so far, of all its processes."""
        if self._unified:
            used = _field(self._cpu, "cpu.stat", "usage_usec") / 1e6
        else:
            used = _number(self._cpu, "cpuacct.usage") / 1e9
        self._cpu_seconds = max(self._cpu_seconds, used)
        return self._cpu_seconds

    def memory_bytes(self) -> int:
        """Memory that counts against its limit, without what the kernel can take back at once."""
        name, inactive = (
            ("memory.current", "inactive_file") if self._unified else ("memory.usage_in_bytes", "total_inactive_file")
        )
        return max(_number(self._memory, name) - _field(self._memory, "memory.stat", inactive), 0)

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for memory."""
        name = "memory.events" if self._unified else "memory.oom_control"
        self._oom_kills = max(self._oom_kills, _field(self._memory, name, "oom_kill"))
        return self._oom_kills

    def new_oom_kills(self) -> int:
        """How many of them since the last look."""
        before = self._oom_kills
        return self.oom_kills() - before


def first_child(pid: int) -> int:
    """The first child of a process; 0 where it has none, or cannot be seen."""
    try:
        children = (_PROC / str(pid) / "task" / str(pid) / "children").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(children[0]) if children else 0


def _paths(pid: int) -> dict[str, Path]:
    """Controller -> its folder for this process; the unified hierarchy's controller is ""."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, Path] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folder = _CGROUPS / controllers / path.lstrip("/")
        found |= dict.fromkeys(controllers.split(","), folder)
    return found


def _number(folder: Path | None, name: str) -> int:
    try:
        return 0 if folder is None else int((folder / name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _field(folder: Path | None, name: str, key: str) -> int:
    try:
        lines = [] if folder is None else (folder / name).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)

"""How a sandbox's container is walled off. The defaults are the strictest that every environment runs under.

Each item is a field, to be switched by its name. `host_config` is what the Docker engine is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Hardening:
    """What holds a container; sizes in MiB. None lifts a bound."""

    user: str = "65534:65534"
    """User and group by number: nobody, with no home and no files."""
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    seccomp: bool = True
    """The engine's default filter of system calls; off is `unconfined`."""
    read_only: bool = True
    """The root file system; what can be written is /tmp and /dev/shm, and both are in memory and bounded."""
    tmp_mb: int = 64
    shm_mb: int = 16
    pids: int | None = 128
    memory_mb: int | None = 2048
    """Memory and swap together."""
    cpus: float | None = 1.0
    """The server runs one thread; what an agent starts shares this."""
    open_files: int = 1024
    init: bool = True
    """A first process that forwards signals and reaps. Without it the server's own timer cannot end it (the kernel
    keeps a container's first process from its own default signals) and only the orchestrator's deadline does."""
    network: str = "none"
    """A network of the engine's by name; sandboxes need none."""
    runtime: str | None = None
    """Another OCI runtime that the daemon knows, such as `runsc`."""

    def host_config(self) -> dict[str, Any]:
        """`HostConfig` of the engine's API, without mounts."""
        tmpfs = f"rw,noexec,nosuid,nodev,size={self.tmp_mb}m,mode=1777,{self._owner()}"
        config: dict[str, Any] = {
            "NetworkMode": self.network,
            "ReadonlyRootfs": self.read_only,
            "Tmpfs": {"/tmp": tmpfs},
            "ShmSize": self.shm_mb * _MIB,
            "Init": self.init,
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "Ulimits": [
                {"Name": "nofile", "Soft": self.open_files, "Hard": self.open_files},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            "SecurityOpt": [
                *(["no-new-privileges"] if self.no_new_privileges else []),
                *([] if self.seccomp else ["seccomp=unconfined"]),
            ],
            "CapDrop": ["ALL"] if self.drop_capabilities else [],
            "LogConfig": {"Type": "none", "Config": {}},
            "RestartPolicy": {"Name": "no"},
        }
        if self.pids is not None:
            config["PidsLimit"] = self.pids
        if self.memory_mb is not None:
            config |= {"Memory": self.memory_mb * _MIB, "MemorySwap": self.memory_mb * _MIB, "MemorySwappiness": 0}
        if self.cpus is not None:
            config["NanoCpus"] = int(self.cpus * 1e9)
        if self.runtime is not None:
            config["Runtime"] = self.runtime
        return config

    def _owner(self) -> str:
        user, _, group = self.user.partition(":")
        return f"uid={user},gid={group or user}"

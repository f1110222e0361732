"""How a sandbox's container is walled off. The defaults are the strictest that every environment runs under.

Each item is a field, to be switched by its name. `host_config` is what the Docker engine is told.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from backends.environments.catalog import Resources

LEAST_FILES: Final = 64
"""What the runtime itself and a server that has just started hold open, and some."""
LEAST_MEMORY_MB: Final = 64
"""An interpreter with the server loaded takes about 30."""
_MIB: Final = 1 << 20
_UNBOUNDED: Final = 1 << 50
"""The engine takes a size of 0 for its own default, which is a bound."""
_USER: Final = re.compile(r"[0-9]{1,9}(:[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Hardening:
    """What holds a container; sizes are in MiB. A bound that is None is the environment's own, 0 is none at all; so is
    an `egress` of None, and () allows nothing. Raises ValueError for what no container can be started with."""

    user: str = "65534:65534"
    """User and group by number: nobody, with no home and no files. Empty: the image's own."""
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    seccomp: bool = True
    """The engine's default filter of system calls."""
    read_only: bool = True
    """The root file system. What can be written is /tmp and /dev/shm; both lie in memory and are bounded."""
    init: bool = True
    """A first process that forwards signals and reaps. Without it the server's own timer cannot end it (the kernel
    keeps a container's first process from its own default signals) and only the orchestrator's deadline does."""
    network: str = "none"
    """A network of the engine's, by name. Sandboxes need none: they dial out over a socket in a folder."""
    runtime: str | None = None
    """Another OCI runtime that the daemon knows, such as `runsc`."""
    open_files: int = 1024
    cpus: float | None = None
    memory_mb: int | None = None
    pids: int | None = None
    tmp_mb: int | None = None
    shm_mb: int | None = None
    egress: tuple[str, ...] | None = None
    """Destinations (`HOST:PORT`) that may be reached, through a proxy of the orchestrator's and never by a network."""

    def __post_init__(self) -> None:
        for name in ("cpus", "memory_mb", "pids", "tmp_mb", "shm_mb"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be positive, or 0 for no bound, not {value}")
        if self.user and not _USER.fullmatch(self.user):
            raise ValueError(f"user must be UID or UID:GID by number, as in 65534:65534, not {self.user!r}")
        if self.open_files < LEAST_FILES:
            raise ValueError(f"open_files must be at least {LEAST_FILES}, not {self.open_files}")
        if self.memory_mb is not None and 0 < self.memory_mb < LEAST_MEMORY_MB:
            raise ValueError(f"memory_mb must be at least {LEAST_MEMORY_MB}, or 0 for no bound, not {self.memory_mb}")

    def bounds(self, resources: Resources) -> Resources:
        """The environment's own bounds, with those that are given here over them."""
        own = {field.name: getattr(self, field.name) for field in fields(resources)}
        given = {name: value for name, value in own.items() if value is not None}
        return type(resources)(**{field.name: getattr(resources, field.name) for field in fields(resources)} | given)

    def host_config(self, resources: Resources) -> dict[str, Any]:
        """`HostConfig` of the engine's API, without mounts."""
        bounds = self.bounds(resources)
        config: dict[str, Any] = {
            "NetworkMode": self.network,
            "ReadonlyRootfs": self.read_only,
            "Tmpfs": {"/tmp": self._tmpfs(bounds.tmp_mb)},
            "ShmSize": bounds.shm_mb * _MIB or _UNBOUNDED,
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
            "PidsLimit": bounds.pids,
            "NanoCpus": int(bounds.cpus * 1e9),
            "Memory": bounds.memory_mb * _MIB,
            "MemorySwap": bounds.memory_mb * _MIB,
        }
        return config if self.runtime is None else {**config, "Runtime": self.runtime}

    def _tmpfs(self, size_mb: int) -> str:
        user, _, group = self.user.partition(":")
        owner = f",uid={user},gid={group or user}" if user else ""
        size = f",size={size_mb}m" if size_mb else ""
        return f"rw,noexec,nosuid,nodev,mode=1777{owner}{size}"

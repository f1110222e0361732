"""What a service admits, and for how long. Values only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from orchestrator.errors import UsageError

MAX_REQUEST: Final = 4 * 1024 * 1024
"""Bytes of a request's body."""
MAX_NAME: Final = 128
"""Characters of an id that a client may choose."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Counts are of the whole service where nothing else is said; times are seconds."""

    instances: int = 4096
    """Live instances, the sessions of our own wire included."""
    instances_per_token: int | None = None
    """Live instances of one token; None is no quota of its own."""
    boxes_per_token: int = 1024
    """Sandboxes of the manager's routes that one token holds; each costs next to nothing."""
    record_bytes: int = 4 * 1024**3
    """Of all instances' records together; beyond it no instance takes a step until others are released."""
    calls: int = 2048
    """Requests under way at once."""
    connections: int = 8192
    """Open connections; fewer where the limit of open files asks for it."""
    idle_s: float = 300.0
    """An instance that no call has named for this long is released; 0 keeps them all."""
    step_s: float = 60.0
    """One step, or grade."""
    body_s: float = 30.0
    """How long the body of a request may take to come."""
    wait_s: float = 30.0
    """How long a call may wait for a sandbox to be free."""
    drain_s: float = 30.0
    """How long instances may go on once the service has been told to end."""

    @property
    def call_s(self) -> float:
        """A whole call: the wait for a sandbox, and a step that is tried again where its sandbox was lost."""
        return self.wait_s + 4 * self.step_s

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0 if each.name in {"idle_s", "drain_s"} else 1e-3 if each.name.endswith("_s") else 1
            if value is not None and not value >= least:
                raise UsageError(f"{each.name} must be at least {least:g}, not {value}")

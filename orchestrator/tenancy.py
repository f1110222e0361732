"""A sandbox's time in the pool, and the lease that an episode holds on it.

Always true: a tenancy never has more leases than its limit; once it is worn, or retired, it stays so; it is idle only
after it was retired, so that whoever leases a worn one that still serves keeps it. `worn` and `idle` are futures, so
that the pool can wait for them beside the sandbox's loss.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.protocols import Sandbox, SandboxLimits
    from orchestrator.types import Failure


class Tenancy:
    """One sandbox between its start and its end. `changed` is called when a lease is given back."""

    __slots__ = (
        "_changed",
        "_limits",
        "_used",
        "idle",
        "leases",
        "leases_at_loss",
        "lent",
        "retired",
        "sandbox",
        "worn",
    )

    def __init__(self, sandbox: Sandbox, limits: SandboxLimits, changed: Callable[[], None]) -> None:
        self.sandbox = sandbox
        self.leases = 0
        self.leases_at_loss = 0
        self.lent = False
        """Whether a suspect waits for it, or has it: it takes nobody else in."""
        self.retired = False
        self.worn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the sandbox should be replaced."""
        self.idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it is retired and nobody holds it."""
        self._limits = limits
        self._used = 0
        self._changed = changed
        sandbox.lost.add_done_callback(self._note)  # before the episodes hear of it, and let go

    @property
    def open(self) -> bool:
        """Whether sessions may still be opened here, at this time or another."""
        worn_out = self.retired or (self.worn.done() and self._limits.sessions is not None)
        return not worn_out and not self.sandbox.lost.done()

    @property
    def has_room(self) -> bool:
        """Whether one more session may be opened here now."""
        sessions = self._limits.sessions
        return self.open and not self.lent and (sessions is None or self.leases < sessions)

    @property
    def empty(self) -> bool:
        """Whether it lives, nobody holds it, and no call that was given up is still at work."""
        return self.open and self.leases == 0 and self.sandbox.statistics().pending == 0

    def take(self, *, opens: bool) -> None:
        """One lease more; `opens` says whether a session will be opened under it."""
        self.leases += 1
        self._used += opens
        if self._limits.episodes is not None and self._used >= self._limits.episodes:
            self.wear()

    def give_back(self) -> None:
        """One lease less."""
        self.leases -= 1
        self._settle()
        self._changed()

    def wear(self) -> None:
        """Have it replaced. Idempotent."""
        if not self.worn.done():
            self.worn.set_result(None)

    def retire(self) -> None:
        """It takes nobody in any more."""
        self.retired = True
        self._settle()

    def _note(self, lost: asyncio.Future[Failure]) -> None:
        self.leases_at_loss = self.leases

    def _settle(self) -> None:
        if self.leases == 0 and self.retired and not self.idle.done():
            self.idle.set_result(None)


class Lease:
    """A sandbox's place for one session; release it when the session is over."""

    __slots__ = ("_tenancy", "sandbox")

    def __init__(self, tenancy: Tenancy, *, opens: bool = True) -> None:
        self._tenancy = tenancy
        self.sandbox = tenancy.sandbox
        tenancy.take(opens=opens)

    def release(self) -> None:
        """Give the place back; once."""
        self._tenancy.give_back()

"""The instances that clients hold over HTTP, and the boxes of the manager's routes that they may lie in.

Owns every instance until it is released: by its client, with its box, for being idle, or with the service. Always true:
an id names at most one live instance of its owner; an instance is admitted before it is opened, and its place is given
back when it is released; one that a call has under way, or has named within `idle_s`, is not idle. Why an instance is
gone is remembered for a while, so that a late call is told.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

from backends.agentscope.instance import Instance
from orchestrator.service.limits import MAX_NAME
from orchestrator.service.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from orchestrator.service.hall import Hall
    from orchestrator.service.limits import ServiceLimits
    from orchestrator.service.tenants import Admission, Place, Tenant

REMEMBERED: Final = 1024
"""Released instances of which it is known why."""
_SWEEPS: Final = 20.0
"""Sweeps in one idle time."""


class Owner(NamedTuple):
    """Whose an instance is: a tenant, and within it a box of the manager's or, with "", none."""

    tenant: Tenant
    box: str = ""


@dataclass(slots=True, eq=False)
class _Held:
    """An instance, its place, when it was called last, and how many calls are under way."""

    instance: Instance
    place: Place
    called: float
    calls: int = 0


class Register:
    """See the module's docstring."""

    def __init__(self, admission: Admission, limits: ServiceLimits) -> None:
        self._admission = admission
        self._limits = limits
        self._held: dict[Owner, dict[str, _Held]] = {}
        self._opening: set[tuple[Owner, str]] = set()
        self._gone: OrderedDict[tuple[Owner, str], str] = OrderedDict()
        self.released_idle = 0

    async def create(
        self, owner: Owner, hall: Hall, name: str | None, task: str, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Open an instance; what creating it says. Raises Refusal (409: the id is taken), SandboxError, UsageError.

        Cancelled: nothing is held.
        """
        name = self._reserve(owner, name)
        try:
            place = self._admission.instance(owner.tenant)
            try:
                instance = await Instance.open(hall, hall.environment, task, params, timeout=self._limits.step_s)
            except BaseException:
                place.give_back()
                raise
        finally:
            self._opening.discard((owner, name))
        place.weigh(instance.episode.size)
        self._held.setdefault(owner, {})[name] = _Held(instance, place, time.monotonic())
        self._gone.pop((owner, name), None)
        return instance.opening(name)

    def _reserve(self, owner: Owner, name: str | None) -> str:
        if name is None:
            name = f"exp_{int(time.time())}_{uuid4().hex[:8]}"
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise Refusal(400, f"an instance_id is 1 to {MAX_NAME} printable characters")
        if name in self._held.get(owner, {}) or (owner, name) in self._opening:
            raise Refusal(409, f"instance {name} exists already: release it first, or choose another id")
        self._opening.add((owner, name))
        return name

    @contextmanager
    def calling(self, owner: Owner, name: str, *, step: bool = False) -> Iterator[Instance]:
        """The instance, for the time of one call. Raises Refusal (404; 503 where a step finds no room to record it)."""
        held = self._held.get(owner, {}).get(name)
        if held is None:
            why = self._gone.get((owner, name))
            raise Refusal(404, f"Instance {name[:MAX_NAME]} not found!{f' {why}' if why else ''}")
        if step:
            self._admission.step()
        held.calls += 1
        try:
            yield held.instance
        finally:
            held.calls -= 1
            held.place.weigh(held.instance.episode.size)
            held.called = time.monotonic()

    def release(self, owner: Owner, name: str, why: str = "It was released.") -> bool:
        """Forget an instance; whether there was one. A call under way may still be answered, the next one is 404."""
        mine = self._held.get(owner, {})
        held = mine.pop(name, None)
        if held is None:
            return False
        if not mine:
            del self._held[owner]
        held.instance.close()
        held.place.give_back()
        self._gone[owner, name] = why
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        return True

    def release_all(self, owner: Owner, why: str) -> None:
        """Forget all instances of an owner."""
        for name in self.names(owner):
            self.release(owner, name, why)

    def names(self, owner: Owner) -> list[str]:
        """The ids of an owner's instances."""
        return list(self._held.get(owner, {}))

    async def sweep(self) -> None:
        """Release what is idle, until cancelled."""
        idle_s = self._limits.idle_s
        while idle_s:
            await asyncio.sleep(idle_s / _SWEEPS)
            since = time.monotonic() - idle_s
            idle = [
                (owner, name)
                for owner, mine in self._held.items()
                for name, held in mine.items()
                if not held.calls and held.called < since
            ]
            for owner, name in idle:
                self.release(owner, name, f"It was released: no call had named it for {idle_s:g} s.")
            self.released_idle += len(idle)

    def close(self) -> None:
        """Release everything."""
        for owner in list(self._held):
            self.release_all(owner, "The service has ended.")

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

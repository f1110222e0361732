"""The boxes of the manager's routes: names that a client takes, and under which its instances lie.

Owns the boxes. A box is a name and an environment, no process: it costs nothing, and so it outlives idle instances. It
ends when its client releases it, or where its tenant has as many as it may, when it has held no instance and no call
has named it for BOX_IDLE_S. Always true: a box belongs to one tenant, and nobody else can find it.
"""

from __future__ import annotations

import secrets
import string
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from orchestrator.service.limits import MAX_NAME
from orchestrator.service.refusals import Refusal, over_quota
from orchestrator.service.register import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from orchestrator.service.limits import ServiceLimits
    from orchestrator.service.register import Register
    from orchestrator.service.tenants import Tenant

BOX_IDLE_S: Final = 24 * 3600.0
_PREFIX: Final = "runtime_sandbox_container_"
_LETTERS: Final = string.ascii_lowercase + string.digits
_LENGTH: Final = 25


@dataclass(slots=True, eq=False)
class Box:
    """`variables`, over the service's own, decide what its splits hold; `meta` is the client's own.

    Times are seconds since the epoch.
    """

    name: str
    environment: str
    tenant: Tenant
    variables: Mapping[str, str]
    meta: Mapping[str, Any]
    called: float = field(default_factory=time.time)

    @property
    def owner(self) -> Owner:
        """Whose the instances in it are."""
        return Owner(self.tenant, self.name)

    @property
    def context(self) -> str:
        """The client's name for what the box is used in."""
        return str(self.meta.get("session_ctx_id", ""))[:MAX_NAME]


class Boxes:
    """See the module's docstring."""

    def __init__(self, register: Register, limits: ServiceLimits) -> None:
        self._register = register
        self._limits = limits
        self._boxes: dict[Tenant, dict[str, Box]] = {}

    def take(self, tenant: Tenant, environment: str, variables: Mapping[str, str], meta: Mapping[str, Any]) -> Box:
        """A new box. Raises Refusal (429)."""
        mine = self._boxes.setdefault(tenant, {})
        if len(mine) >= self._limits.boxes_per_token:
            self._forget_idle(mine)
        if len(mine) >= self._limits.boxes_per_token:
            raise over_quota(f"this token holds {len(mine)} sandboxes, its quota: release some")
        name = _PREFIX + "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        box = mine[name] = Box(name, environment, tenant, variables, meta)
        return box

    def find(self, tenant: Tenant, name: str) -> Box:
        """A box of the tenant's. Raises Refusal (404)."""
        box = self._boxes.get(tenant, {}).get(name)
        if box is None:
            raise Refusal(404, f"No container found with id: {name[:MAX_NAME]}.")
        box.called = time.time()
        return box

    def release(self, tenant: Tenant, name: str) -> None:
        """End a box, and every instance in it. Idempotent."""
        box = self._boxes.get(tenant, {}).pop(name, None)
        if box is not None:
            self._register.release_all(box.owner, "Its sandbox was released.")

    def of(self, tenant: Tenant) -> list[Box]:
        """All boxes of a tenant."""
        return list(self._boxes.get(tenant, {}).values())

    def _forget_idle(self, mine: dict[str, Box]) -> None:
        since = time.time() - BOX_IDLE_S
        for name, box in list(mine.items()):
            if box.called < since and not self._register.names(box.owner):
                del mine[name]

    def __len__(self) -> int:
        return sum(map(len, self._boxes.values()))

"""Who may ask, and how much of the service each holds.

Owns the counts of live instances and of requests under way. Always true: every admitted instance and request is
counted exactly once until its `Place` is given back; a token is compared in constant time and never logged.
"""

from __future__ import annotations

import hmac
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.errors import UsageError
from orchestrator.service.refusals import Refusal, busy, over_quota

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from orchestrator.service.limits import ServiceLimits


class Tenant:
    """Whoever holds one token. Instances and sandboxes of other tenants do not exist for it."""

    __slots__ = ("instances", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.instances = 0


class Tenants:
    """The tokens by the name of their tenant. Without any token everybody is the same tenant."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        if any(not token.strip() for token in tokens.values()):
            raise UsageError("a token is empty: set the variable that holds it")
        self._tokens = {name: token.encode() for name, token in tokens.items()}
        self._tenants = {name: Tenant(name) for name in tokens} or {"": Tenant("")}

    @property
    def open(self) -> bool:
        """Whether no token is asked for."""
        return not self._tokens

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises Refusal (401)."""
        if self.open:
            return self._tenants[""]
        if authorization is None:
            raise Refusal(401, "Authentication required")
        scheme, _, given = authorization.partition(" ")
        found = None
        for name, token in self._tokens.items():
            if hmac.compare_digest(token, given.strip().encode("utf-8", "surrogateescape")):
                found = name
        if scheme.lower() != "bearer" or found is None:
            raise Refusal(401, "Invalid authentication credentials")
        return self._tenants[found]


class AdmissionStatistics(NamedTuple):
    """Instances and requests now, how many were refused so far, and the bytes of all records."""

    instances: int
    calls: int
    refused: int
    record_bytes: int


class Admission:
    """Admits instances and requests, or says no at once: nothing waits here."""

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self._instances = 0
        self._calls = 0
        self._refused = 0
        self._bytes = 0
        self.draining = False
        """Set when the service ends: what lives may go on, nothing begins."""

    @contextmanager
    def call(self) -> Iterator[None]:
        """One request. Raises Refusal (503)."""
        if self._calls >= self._limits.calls:
            self._refused += 1
            raise busy(f"{self._calls} requests are under way, which is all that this service takes at once")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def instance(self, tenant: Tenant) -> Place:
        """One instance more of a tenant. Raises Refusal (429, 503)."""
        quota = self._limits.instances_per_token
        if self.draining:
            self._refused += 1
            raise busy("the service is ending: it takes no more instances")
        if quota is not None and tenant.instances >= quota:
            self._refused += 1
            raise over_quota(f"this token has {quota} live instances, its quota: release some")
        if self._instances >= self._limits.instances:
            self._refused += 1
            raise busy(f"{self._instances} instances live, which is all that this service holds")
        self._instances += 1
        tenant.instances += 1
        return Place(self, tenant)

    def step(self) -> None:
        """One step more of some instance, whose record grows by it. Raises Refusal (503)."""
        if self._bytes >= self._limits.record_bytes:
            self._refused += 1
            raise busy("the records of all instances take the memory that they may: release those that are done")

    def weigh(self, more: int) -> None:
        """A record has grown, or is forgotten; called by its place."""
        self._bytes += more

    def give_back(self, tenant: Tenant) -> None:
        """One instance less; called by its place, once."""
        self._instances -= 1
        tenant.instances -= 1

    def statistics(self) -> AdmissionStatistics:
        """Counts; cheap."""
        return AdmissionStatistics(self._instances, self._calls, self._refused, self._bytes)


class Place:
    """An admitted instance's place. Give it back when the instance has ended."""

    __slots__ = ("_admission", "_bytes", "_tenant")

    def __init__(self, admission: Admission, tenant: Tenant) -> None:
        self._admission: Admission | None = admission
        self._tenant = tenant
        self._bytes = 0

    def weigh(self, size: int) -> None:
        """Say how many bytes the instance's record has now; nothing once the place is given back."""
        if self._admission is not None:
            self._admission.weigh(size - self._bytes)
            self._bytes = size

    def give_back(self) -> None:
        """Idempotent."""
        self.weigh(0)
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.give_back(self._tenant)

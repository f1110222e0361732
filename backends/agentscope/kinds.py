"""What a box is made of: its kind, its limits, and the desk behind it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from backends.agentscope.embedded import EmbeddedDesk
from backends.agentscope.registry import TIMEOUT, SandboxConfig, SandboxRegistry, SandboxType, made, registered
from backends.environments.catalog import find, names
from orchestrator.errors import SandboxError, UnknownName, UsageError
from orchestrator.names import unknown
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from backends.agentscope.desk import Desk

T = TypeVar("T")
WAIT_S: Final = 3000.0
"""How long one call of a box may take where nothing else is said, starting its sandbox included."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A box's arguments, checked. `timeout` is in seconds."""

    sandbox_type: SandboxType
    config: SandboxConfig
    sandbox_id: str | None
    timeout: float
    base_url: str | None
    bearer_token: str | None

    def desk(self) -> Desk:
        """A fresh desk for a box of this kind. Raises UsageError; UnknownName where nothing here serves it."""
        if self.base_url is not None:
            from backends.agentscope.http import Channel  # needed with a server alone
            from backends.agentscope.remote import RemoteDesk

            channel = Channel(self.base_url, token=self.bearer_token, timeout=self.timeout)
            return RemoteDesk(channel, self.sandbox_type, self.sandbox_id)
        timeout = min(self.timeout, self.config.timeout)
        if self.config.image_name and not _in_catalogue(str(self.sandbox_type)):
            from backends.agentscope.image import ImageDesk  # its client of Docker is heavy

            return ImageDesk(self.config, sandbox_id=self.sandbox_id, timeout=timeout, record=self._record())
        return EmbeddedDesk(
            self._environment(),
            sandbox_id=self.sandbox_id,
            timeout=timeout,
            variables={**os.environ, **self.config.environment},
            record=self._record(),
        )

    def _environment(self) -> str:
        try:
            return find(str(self.sandbox_type)).name
        except UnknownName as error:
            raise UnknownName(
                f"nothing here serves boxes of the kind {self.sandbox_type}: {error}. Register an image for it, or "
                f"name a server that has it with base_url"
            ) from None

    def _record(self) -> dict[str, Any]:
        return {
            "url": None,
            "ports": [],
            "mount_dir": None,
            "storage_path": None,
            "runtime_token": None,
            "version": self.config.image_name,
            "meta": {},
            "timeout": self.config.timeout,
            "sandbox_type": str(self.sandbox_type),
        }


def _in_catalogue(name: str) -> bool:
    try:
        find(name)
    except UnknownName:
        return False
    return True


def checked(
    box: type,
    box_type: SandboxType | str | None,
    sandbox_id: str | None,
    timeout: float,
    base_url: str | None,
    bearer_token: str | None,
) -> Kind:
    """The kind of a box of class `box`. Raises UsageError, UnknownName."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise UsageError(f"timeout must be a positive number of seconds, not {timeout!r}")
    own = next((config for cls in box.__mro__ if (config := SandboxRegistry.get_config(cls)) is not None), None)
    if box_type is None:
        box_type = SandboxType.APPWORLD if own is None else own.sandbox_type
    found = _kind(str(box_type))
    config = own if own is not None and own.sandbox_type == found else SandboxRegistry.get_config_by_type(found)
    if config is None:
        config = SandboxConfig("", found, timeout=TIMEOUT)
    return Kind(found, config, sandbox_id, float(timeout), base_url, bearer_token)


def _kind(name: str) -> SandboxType:
    """A kind by its name: a member, a registered one, or an environment. Raises UnknownName."""
    if name not in registered() and not _in_catalogue(name):
        raise unknown("sandbox type", name, {*registered(), *names()})
    return made(name)


async def bounded(work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
    """`work`, given up after `timeout` seconds. Raises SandboxError then."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise
        message = f"no answer within {timeout:g} s; a longer `timeout` of the box gives it more"
        raise SandboxError(Failure(FailureKind.SANDBOX_HUNG, what, message)) from None

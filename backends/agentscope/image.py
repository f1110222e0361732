"""The desk of a box whose kind has an image of its own: the image's service, in a container that this box starts.

Owns the container, through a backend that one task enters and leaves, and the desk that speaks to its service. Always
true: the box has one container, from `start` to `close`; instances are the service's, and are gone with it; when it has
ended, calls say why.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from backends.agentscope.http import Channel
from backends.agentscope.remote import RemoteDesk
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.service_backend import ServiceImageBackend
from backends.sandboxes.docker.service_image import OF_ORIGINALS, ServiceImage, volumes_of
from orchestrator.errors import RolloutError, RunFailed, SandboxError, SandboxLost, Unavailable, UsageError
from orchestrator.types import RunId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.agentscope.registry import SandboxConfig
    from backends.sandboxes.remote.instances import ServiceSandbox

_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:ib?|b)?", re.IGNORECASE)
_SETTINGS: Final = (
    "cpus",
    "mem_limit",
    "nano_cpus",
    "pids_limit",
    "read_only",
    "runtime",
    "shm_size",
    "user",
    "volumes",
)


def service_image(config: SandboxConfig) -> ServiceImage:
    """The image of a registered kind, with what it was registered with. Raises UsageError.

    `runtime_config` has names of the docker client for Python, `resource_limits` are `memory` and `cpu`.
    """
    limits = config.resource_limits
    settings = dict(config.runtime_config)
    if "memory" in limits:
        settings["mem_limit"] = limits["memory"]
    if "cpu" in limits:
        settings["cpus"] = limits["cpu"]
    if unknown := sorted({*settings.keys() - set(_SETTINGS), *limits.keys() - {"memory", "cpu"}}):
        raise UsageError(
            f"{unknown[0]!r} is no setting of a box's container; runtime_config takes {', '.join(_SETTINGS)}, "
            "resource_limits memory and cpu"
        )
    volumes = volumes_of(settings.pop("volumes", ()))
    try:
        hardening = Hardening(**{**_as_given(OF_ORIGINALS), **_items(settings)})
    except (TypeError, ValueError) as error:
        raise UsageError(f"runtime_config: {error}") from None
    return ServiceImage(config.image_name, variables=config.environment, volumes=volumes, hardening=hardening)


class ImageDesk:
    """Satisfies `Desk`. `timeout` bounds one call of an instance in seconds; `record` is what `info` adds to."""

    def __init__(
        self, config: SandboxConfig, *, sandbox_id: str | None, timeout: float, record: Mapping[str, Any]
    ) -> None:
        self._config = config
        self._image = service_image(config)
        self._id = sandbox_id or f"box_{uuid4().hex[:12]}"
        self._timeout = timeout
        self._record = record
        self._keeper: asyncio.Task[None] | None = None
        self._up: asyncio.Future[tuple[ServiceSandbox, RemoteDesk]] | None = None
        self._stop = asyncio.Event()
        self._closed = False

    async def start(self) -> str:
        """See `Desk.start`. The image is pulled where it is missing."""
        await self._started()
        return self._id

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See `Desk.call`. Raises SandboxLost once the container has ended: make another box then."""
        sandbox, desk = await self._started()
        if sandbox.lost.done():
            raise SandboxLost(sandbox.lost.result(), suspect=False)
        try:
            return await desk.call(name, arguments)
        except SandboxError:
            await asyncio.wait({sandbox.doubt()})
            if sandbox.lost.done():
                raise SandboxLost(sandbox.lost.result(), suspect=True) from None
            raise

    async def info(self) -> dict[str, Any]:
        """See `Desk.info`."""
        up = self._up.result() if self._up is not None and self._up.done() and not self._closed else None
        state = "ready" if up is None else "error" if up[0].lost.done() else "running"
        told = {} if up is None else {"instances": (await up[1].info())["instances"], "container_name": str(up[0].id)}
        named = {"session_id": self._id, "container_id": self._id, "container_name": self._id}
        return {**self._record, **named, **told, "state": "released" if self._closed else state}

    async def close(self) -> None:
        """See `Desk.close`: the container goes, with every instance in it."""
        self._closed = True
        self._stop.set()
        if self._keeper is not None:
            if self._up is not None and not self._up.done():
                self._keeper.cancel()
            await asyncio.wait({self._keeper})

    async def _started(self) -> tuple[ServiceSandbox, RemoteDesk]:
        if self._closed:
            raise UsageError("the box is closed: make another one")
        if self._keeper is None or self._keeper.done():
            self._up = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep(self._up), name=f"image-{self._id}")
        assert self._up is not None
        return await asyncio.shield(self._up)

    async def _keep(self, up: asyncio.Future[tuple[ServiceSandbox, RemoteDesk]]) -> None:
        """Everything that is entered is left in this task."""
        backend = ServiceImageBackend(str(self._config.sandbox_type), self._image, deterministic=False)
        run = RunId(f"box-{uuid4().hex[:12]}")
        backend.configure(run=run, with_solutions=False, logs=None, call_limit_s=self._timeout)
        try:
            async with backend:
                sandbox = await backend.create()
                channel = Channel(
                    sandbox.channel.base_url, token=None, timeout=self._timeout, socket=sandbox.channel.socket
                )
                up.set_result((sandbox, RemoteDesk(channel, self._config.sandbox_type, None)))
                try:
                    await self._stop.wait()
                finally:
                    await channel.close()
        except RolloutError as error:
            if up.done():
                raise
            up.set_exception(self._explained(error))
            up.exception()  # seen: whoever waits is told
        finally:
            if not up.done():
                up.set_exception(RunFailed(f"the container of {self._config.image_name} was not started"))
                up.exception()

    def _explained(self, error: RolloutError) -> RolloutError:
        """Where the image cannot be had here, the error names the other way."""
        if not isinstance(error, Unavailable):
            return error
        kind = self._config.sandbox_type
        return Unavailable(f"{error}. A server that has boxes of the kind {kind} is named with base_url")


def _as_given(hardening: Hardening) -> dict[str, Any]:
    return {name: getattr(hardening, name) for name in hardening.__slots__}


def _items(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the docker client, as items of `Hardening`."""
    named = {"mem_limit": "memory_mb", "shm_size": "shm_mb", "pids_limit": "pids", "nano_cpus": "cpus"}
    return {named.get(name, name): _value(name, value) for name, value in settings.items()}


def _value(name: str, value: Any) -> Any:
    match name:
        case "mem_limit" | "shm_size":
            return max(_bytes(value) >> 20, 1)
        case "nano_cpus":
            return int(value) / 1e9
        case "cpus":
            return float(value)
        case "user":
            return str(value)
        case _:
            return value


def _bytes(value: Any) -> int:
    """A size as the docker client reads it: bytes, or a text as in `5.06gb`."""
    if isinstance(value, int):
        return value
    found = _SIZE.fullmatch(str(value).strip())
    if found is None:
        raise ValueError(f"a size is as in 512m or 5.06gb, not {value!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])

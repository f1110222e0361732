"""Whose a container is, and what may be removed: only what an owner left that is certainly dead.

An owner is a process, told apart by the boot it ran in, its number, its start and its namespace of process numbers. One
of another namespace cannot be judged from here and is never touched; one of an earlier boot is dead.
"""

from __future__ import annotations

import asyncio
import logging
import os
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from backends.sandboxes.docker.port import Engine, EngineError
from orchestrator.rundir import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.sandboxes.docker.port import Listed

RUN: Final = "rollout.run"
BACKEND: Final = "rollout.backend"
"""One backend of a process: the next one's containers are not for the reaper of the one before."""
OWNER: Final = "rollout.owner"
NAMESPACE: Final = "rollout.namespace"
REMOVES: Final = 8
"""Removals at once."""
REMOVE_S: Final = 30.0
"""One removal; one that hangs holds no other back."""

log = logging.getLogger(__name__)


class Standing(StrEnum):
    """What is known of an owner from here."""

    ALIVE = "alive"
    DEAD = "dead"
    """On this machine and in this namespace of processes no such process runs."""
    UNKNOWN = "unknown"
    """It belongs to another namespace of processes, or the labels are not ours."""


def owner_labels() -> dict[str, str]:
    """The labels that name this process as the owner."""
    owner = Owner.current()
    return {OWNER: f"{owner.boot}:{owner.pid}:{owner.start}", NAMESPACE: _namespace()}


def standing(labels: Mapping[str, str]) -> Standing:
    """Whether the owner that the labels name is alive."""
    boot, _, rest = labels.get(OWNER, "").partition(":")
    pid, _, start = rest.partition(":")
    if not (pid.isdecimal() and start.isdecimal()):
        return Standing.UNKNOWN
    owner = Owner(boot, int(pid), int(start))
    if owner.boot == Owner.current().boot and labels.get(NAMESPACE) != _namespace():
        return Standing.UNKNOWN
    return Standing.ALIVE if owner.alive() else Standing.DEAD


async def owned(engine: Engine) -> list[tuple[Listed, Standing]]:
    """Every container of any owner, with what is known of it. Raises EngineError."""
    return [(one, standing(one.labels)) for one in await engine.containers({OWNER: None})]


async def clear_strays(engine: Engine) -> list[str]:
    """Remove what dead owners left; the names of what was removed. Raises EngineError where it cannot be listed."""
    return await _remove(engine, [one for one, state in await owned(engine) if state is Standing.DEAD])


async def remove_all(socket: str, labels: Mapping[str, str]) -> int:
    """Remove all containers that carry the labels, at the daemon of a socket; how many there were.

    Raises EngineError, Unavailable.
    """
    async with await Engine.connect(f"unix://{socket}") as engine:
        found = await engine.containers(labels)
        await _remove(engine, found)
    return len(found)


async def _remove(engine: Engine, containers: Sequence[Listed]) -> list[str]:
    """Remove some at once; what will not go is logged."""
    gate = asyncio.Semaphore(REMOVES)
    removed: list[str] = []

    async def one(container: Listed) -> None:
        async with gate:
            try:
                await engine.remove(container.id, within_s=REMOVE_S)
            except EngineError as error:
                log.warning("container %s cannot be removed: %s", container.names[0], error)
            else:
                removed.append(container.names[0])

    async with asyncio.TaskGroup() as tasks:
        for container in containers:
            tasks.create_task(one(container), name=f"remove-{container.names[0]}")
    return removed


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""

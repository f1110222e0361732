"""Whose a container is, and what may be removed: only what an owner left that is certainly dead.

An owner is a process, told apart by the boot it ran in, its number, its start and its namespace of process numbers.
Where it can be seen, that decides. Elsewhere its lease does, where it has one: the container of its outpost, which runs
as long as it hears of its owner. An owner without a lease was on the daemon's own machine: one of an earlier boot is
dead, and one of another namespace, or seen from another machine, cannot be judged and is never touched. No container
outlives the boot of its machine: one that runs is not of an earlier boot, but of a machine that a forwarded socket
leads to, or of a guest of this one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from enum import StrEnum
from types import MappingProxyType
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
LEASE: Final = "rollout.lease"
"""The name of the outpost that a container depends on, and that one's own."""
_NOT_YET: Final = "created"
_HELD: Final = frozenset({"running", "paused", "restarting"})
REMOVES: Final = 8
"""Removals at once."""
REMOVE_S: Final = 30.0
"""One removal; one that hangs holds no other back."""

log = logging.getLogger(__name__)


class Standing(StrEnum):
    """What is known of an owner from here."""

    ALIVE = "alive"
    DEAD = "dead"
    """No such process runs where it would be seen, or its lease has run out."""
    UNKNOWN = "unknown"
    """It cannot be seen from here and has no lease, or not yet; or the labels are not ours."""


def owner_labels() -> dict[str, str]:
    """The labels that name this process as the owner."""
    owner = Owner.current()
    return {OWNER: f"{owner.boot}:{owner.pid}:{owner.start}", NAMESPACE: _namespace()}


def standing(
    labels: Mapping[str, str],
    leases: Mapping[str, str] = MappingProxyType({}),
    *,
    state: str = "",
    remote: bool = False,
) -> Standing:
    """Whether the owner that the labels name is alive. `leases` are the outposts by name, and how each stands; `state`
    is how the container itself does; `remote` says that the daemon is another machine's."""
    boot, _, rest = labels.get(OWNER, "").partition(":")
    pid, _, start = rest.partition(":")
    if not (pid.isdecimal() and start.isdecimal()):
        return Standing.UNKNOWN
    owner, lease = Owner(boot, int(pid), int(start)), labels.get(LEASE)
    same_boot = owner.boot == Owner.current().boot
    if same_boot and labels.get(NAMESPACE) == _namespace() and (boot or not lease):
        return Standing.ALIVE if owner.alive() else Standing.DEAD
    if lease:
        held = leases.get(lease, "")
        if held == _NOT_YET:
            return Standing.UNKNOWN
        return Standing.ALIVE if held in _HELD else Standing.DEAD
    return Standing.UNKNOWN if remote or same_boot or state in _HELD else Standing.DEAD


async def owned(engine: Engine) -> list[tuple[Listed, Standing]]:
    """Every container of any owner, with what is known of it. Raises EngineError."""
    found = await engine.containers({OWNER: None})
    leases = {one.names[0]: one.state for one in found if one.labels.get(LEASE) == one.names[0]}
    return [(one, standing(one.labels, leases, state=one.state, remote=engine.remote)) for one in found]


async def clear_strays(engine: Engine) -> list[str]:
    """Remove what dead owners left; the names of what was removed. Raises EngineError where it cannot be listed."""
    return await _remove(engine, [one for one, state in await owned(engine) if state is Standing.DEAD])


async def clear_at_leisure(engine: Engine) -> None:
    """As `clear_strays`, beside other work: what cannot be done now is for the next one who looks. Raises nothing."""
    try:
        await clear_strays(engine)
    except EngineError as error:
        log.warning("what dead orchestrators have left cannot be looked for: %s", error)


async def remove_all(url: str, labels: Mapping[str, str]) -> int:
    """Remove all containers that carry the labels, at the daemon of `url`; how many there were.

    Raises EngineError, Unavailable.
    """
    async with await Engine.connect(url) as engine:
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

"""Whose a container is, and what may be removed: only what an owner left that is certainly dead.

An owner is a process, told apart by the boot it ran in, its number, its start and its namespace of process numbers. One
of another namespace cannot be judged from here and is never touched; one of an earlier boot is dead.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from backends.sandboxes.docker.port import EngineError
from orchestrator.rundir import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.sandboxes.docker.port import Engine, Listed

RUN: Final = "rollout.run"
OWNER: Final = "rollout.owner"
NAMESPACE: Final = "rollout.namespace"

log = logging.getLogger(__name__)


def owner_labels(owner: Owner | None = None) -> dict[str, str]:
    """The labels that name this process (or another of its namespace) as the owner."""
    one = owner or Owner.current()
    return {OWNER: f"{one.boot}:{one.pid}:{one.start}", NAMESPACE: _namespace()}


def is_stray(labels: Mapping[str, str]) -> bool:
    """Whether the owner that the labels name is certainly dead."""
    boot, _, rest = labels.get(OWNER, "").partition(":")
    pid, _, start = rest.partition(":")
    if not (pid.isdecimal() and start.isdecimal()):
        return False
    owner = Owner(boot, int(pid), int(start))
    same_boot = owner.boot == Owner.current().boot
    if same_boot and labels.get(NAMESPACE) != _namespace():
        return False
    return not owner.alive()


async def strays(engine: Engine) -> Sequence[Listed]:
    """Containers whose owner is certainly dead. Raises EngineError."""
    return [one for one in await engine.containers({OWNER: None}) if is_stray(one.labels)]


async def clear_strays(engine: Engine) -> list[str]:
    """Remove what dead owners left; the names of what was removed. What will not go is logged, and left."""
    removed = []
    for one in await strays(engine):
        try:
            await engine.remove(one.id)
        except EngineError as error:
            log.warning("container %s of a dead owner cannot be removed: %s", one.names[0], error)
        else:
            removed.append(one.names[0])
    return removed


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""

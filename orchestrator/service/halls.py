"""The environments that a service has: which one a client means, and the tasks it asks for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from backends.agentscope import splits
from orchestrator.names import unknown
from orchestrator.service.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from orchestrator.service.hall import Hall

ANY: Final = frozenset({None, "", "default"})
"""What the original's client sends as `env_type` where its caller names none."""


class Halls:
    """The environments that a service has, by name; the first one is meant where a client names none."""

    def __init__(self, halls: Mapping[str, Hall]) -> None:
        self._halls = halls

    def find(self, name: str | None) -> Hall:
        """The hall of an environment. Raises Refusal (400)."""
        if name in ANY:
            return next(iter(self._halls.values()))
        hall = self._halls.get(str(name))
        if hall is None:
            raise Refusal(400, str(unknown("env_type", str(name)[:80], self._halls)))
        return hall

    async def tasks(self, name: str | None, params: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
        """The ids of `params["split"]`. Raises Refusal, UsageError, SandboxError."""
        hall = self.find(name)
        split = params.get("split", "train")
        if not isinstance(split, str):
            raise Refusal(400, "the parameter split must be a text")
        wanted = await asyncio.to_thread(splits.resolve, hall.environment, split, variables)
        return wanted if isinstance(wanted, list) else list((await hall.tasks(wanted)).ids)

    def __iter__(self) -> Iterator[Hall]:
        return iter(self._halls.values())

"""The desk of a box on a server: over a sandbox manager's routes where it has them, else over an environment service's.

Owns one HTTP session, the sandbox it took from a manager, and the ids of the instances it asked for. Always true: no
call is sent twice; every instance has an id of our choice before it is asked for, so that one whose creation was not
answered is released with the others; a sandbox that was there before (`sandbox_id`) is left there.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from backends.agentscope.desk import checked_arguments
from backends.agentscope.http import NoRoute
from backends.agentscope.shapes import action as as_action
from orchestrator.errors import RolloutError, SandboxError, Unavailable, UsageError
from orchestrator.types import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.agentscope.http import Channel
    from backends.agentscope.registry import SandboxType

CLOSE_S: Final = 10.0
"""How long one release may take when a box is closed."""
_SERVICE_ROUTES: Final = {
    "create_instance": "create",
    "step": "step",
    "evaluate": "evaluate",
    "release_instance": "release",
    "get_env_profile": "get_env_profile",
    "get_task_ids": "get_env_profile",
    "get_instance_info": "get_info",
}


class RemoteDesk:
    """Satisfies `Desk`. The channel is closed with it."""

    def __init__(self, channel: Channel, sandbox_type: SandboxType, sandbox_id: str | None) -> None:
        self._channel = channel
        self._type = sandbox_type
        self._given = sandbox_id
        self._identity: str | None = None
        """The sandbox's id at a manager; None before the start, and where the server has no manager."""
        self._id: str | None = None
        self._instances: set[str] = set()
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> str:
        """See `Desk.start`. Raises Unavailable where the server has no sandbox left."""
        async with self._starting:
            if self._closed:
                raise UsageError("the box is closed: make another one")
            if self._id is None:
                self._identity = self._given or await self._taken()
                self._id = self._identity or f"box_{uuid4().hex[:12]}"
            return self._id

    async def _taken(self) -> str | None:
        """A sandbox of the manager's; None where there is no manager."""
        meta = {"session_ctx_id": uuid4().hex}
        try:
            taken = await self._channel.post("create_from_pool", {"sandbox_type": str(self._type), "meta": meta})
        except NoRoute:
            return None
        identity = taken.get("data")
        if not isinstance(identity, str):
            raise Unavailable(f"{self._channel.base_url} has no sandbox of the kind {self._type} free; try again later")
        return identity

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """See `Desk.call`."""
        given = checked_arguments(name, arguments)
        if name == "create_instance":
            given["instance_id"] = given["instance_id"] or f"exp_{int(time.time())}_{uuid4().hex[:8]}"
            if not isinstance(given["task_id"], str) or not given["task_id"]:
                raise UsageError("create_instance needs a task_id: take one of get_env_profile(...)")
        elif name == "step":
            as_action(given["action"])
            if isinstance(given["action"], str):
                given["action"] = {"role": "assistant", "content": given["action"]}
        if "env_type" in given:
            given["env_type"] = given["env_type"] or str(self._type)
        if "split" in given:
            given["split"] = given["split"] or "train"
        await self.start()
        return await self._counted(name, given)

    async def _counted(self, name: str, given: dict[str, Any]) -> Any:
        instance = str(given.get("instance_id"))
        creating = name == "create_instance" and instance not in self._instances
        if creating:
            self._instances.add(instance)
        try:
            answer = await (self._to_service(name, given) if self._identity is None else self._to_manager(name, given))
        except UsageError:
            if creating:  # refused: there is none
                self._instances.discard(instance)
            raise
        if name == "release_instance":
            self._instances.discard(instance)
        return _believed(name, answer)

    async def _to_manager(self, name: str, given: dict[str, Any]) -> Any:
        body = {"identity": self._identity, "tool_name": name, "arguments": given}
        return (await self._channel.post("call_tool", body)).get("data")

    async def _to_service(self, name: str, given: dict[str, Any]) -> Any:
        params = dict(given.get("params") or {})
        if "split" in given:
            params["split"] = given["split"]
        body = {
            "env_type": given.get("env_type") or str(self._type),
            "task_id": given.get("task_id"),
            "instance_id": given.get("instance_id"),
            "messages": given.get("action") or given.get("messages") or {},
            "params": params,
        }
        answer = await self._channel.post(_SERVICE_ROUTES[name], body)
        return answer.get("success") if name == "release_instance" else answer.get("data")

    async def info(self) -> dict[str, Any]:
        """See `Desk.info`."""
        name = await self.start()
        if self._identity is not None:
            answer = (await self._channel.post("get_info", {"identity": self._identity})).get("data")
            if not isinstance(answer, dict):
                raise SandboxError(Failure(FailureKind.PROTOCOL, "get_info", "the server's record is no object"))
            return answer
        return {"container_name": name, "url": self._channel.base_url, "sandbox_type": str(self._type)} | {
            "state": "running",
            "instances": sorted(self._instances),
        }

    async def close(self) -> None:
        """See `Desk.close`. Raises RolloutError where the server could not be told."""
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._release()
        except TimeoutError:
            message = f"{self._channel.base_url} did not answer within {CLOSE_S:g} s"
            raise SandboxError(Failure(FailureKind.SANDBOX_HUNG, "release", message)) from None
        finally:
            await self._channel.close()

    async def _release(self) -> None:
        failure: RolloutError | None = None
        for instance in sorted(self._instances):
            try:
                await self._counted("release_instance", {"instance_id": instance})
            except UsageError:
                continue  # the server does not have it
            except RolloutError as error:
                failure = error
        if self._identity is not None and self._given is None:
            await self._channel.post("release", {"identity": self._identity})
        if failure is not None:
            raise failure


def _believed(name: str, answer: Any) -> Any:
    """An answer of the shape that `name` has. Raises SandboxError."""
    match name, answer:
        case "create_instance", {"state": list(), "info": {"instance_id": str()}}:
            return answer
        case "step", {"state": list(), "reward": int() | float(), "is_terminated": bool()}:
            return answer
        case "evaluate", {"error": error}:  # the original answers a grade that failed like a score
            raise SandboxError(Failure(FailureKind.ENVIRONMENT, name, str(error)))
        case "evaluate", int() | float() | {"accuracy": int() | float()}:
            return answer
        case "release_instance", bool():
            return answer
        case "get_env_profile" | "get_task_ids", list() if all(isinstance(task, str) for task in answer):
            return answer
        case "get_instance_info", str():
            return answer
        case _:
            message = f"the server answered {name} with {str(answer)[:200]}"
            raise SandboxError(Failure(FailureKind.PROTOCOL, name, message))

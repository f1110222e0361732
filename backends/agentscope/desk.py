"""What stands behind a box: something that answers its calls, here or on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from orchestrator.errors import UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import Mapping

CALLS: Final = {
    "create_instance": ("env_type", "task_id", "instance_id", "params"),
    "step": ("instance_id", "action", "params"),
    "evaluate": ("instance_id", "messages", "params"),
    "release_instance": ("instance_id",),
    "get_env_profile": ("env_type", "split", "params"),
    "get_task_ids": ("env_type", "split", "params"),
    "get_instance_info": ("instance_id",),
}
"""The names that `call` takes, and the arguments of each."""

_REQUIRED: Final = {
    "create_instance": ("task_id",),
    "step": ("instance_id", "action"),
    "evaluate": ("instance_id",),
    "release_instance": ("instance_id",),
    "get_instance_info": ("instance_id",),
}


def checked_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call, None where one is not given. Raises UnknownName, UsageError."""
    if name not in CALLS:
        raise unknown("tool", name, CALLS)
    accepted = CALLS[name]
    if extra := sorted(arguments.keys() - set(accepted)):
        raise UsageError(f"{name} takes {', '.join(accepted)}, not {extra[0]!r}")
    for key in ("params", "messages"):
        if not isinstance(arguments.get(key) or {}, dict):
            raise UsageError(f"{key} must be an object")
    return {key: arguments.get(key) for key in accepted}


class Desk(Protocol):
    """Answers one box. All coroutines belong to one event loop; a desk that is closed stays closed."""

    async def start(self) -> str:
        """Make ready and return the box's id; again is the same. Raises RolloutError."""
        ...

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Answer one of `CALLS`. Raises RolloutError. Cancelled: the instance stands where it stood before."""
        ...

    async def info(self) -> dict[str, Any]:
        """The box's record: its id, kind, state and address."""
        ...

    async def close(self) -> None:
        """Release every instance and what serves them. Idempotent."""
        ...


def described(tool_type: str | None = None) -> dict[str, dict[str, Any]]:
    """The calls as tools, under their one type `training`; nothing under any other."""
    if tool_type not in (None, "training"):
        return {}
    return {"training": {name: {"name": name, "json_schema": _schema(name)} for name in CALLS}}


def _schema(name: str) -> dict[str, Any]:
    objects = {"params", "action", "messages"}
    parameters = {key: {"type": "object" if key in objects else "string"} for key in CALLS[name]}
    required = [key for key in CALLS[name] if key in _REQUIRED.get(name, ())]
    return {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": parameters, "required": required},
        },
    }

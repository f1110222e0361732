"""The routes of AgentScope Runtime's sandbox manager: `POST /method` and its arguments, answered by `{"data": result}`.

Each has a twin `method_async` that does the same. A client takes a box, calls tools in it (`call_tool`, whose names and
arguments are `backends.agentscope.desk.CALLS`) and releases it. Errors have the status that they deserve, where the
original says 500. There is no container behind a box, so `start` and `stop` have little to do, and its record says so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.agentscope.desk import checked_arguments, described
from backends.agentscope.splits import SUB_TYPE
from orchestrator.service.refusals import Refusal
from orchestrator.service.routes import Body, Route

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.service.boxes import Box, Boxes
    from orchestrator.service.halls import Halls
    from orchestrator.service.register import Register
    from orchestrator.service.tenants import Tenant

IGNORED: Final = frozenset({"OPENAI_API_KEY"})
"""A variable that the original had to be given, and that nothing here reads."""

MAX_META: Final = 16 * 1024
"""Bytes of a client's own notes on a box."""


class Creation(Body):
    """The arguments of `create` and `create_from_pool`."""

    sandbox_type: str | None = None
    meta: dict[str, Any] | None = None
    mount_dir: str | None = None
    storage_path: str | None = None
    environment: dict[str, str] | None = None


class Named(Body):
    """The arguments of what is done to one box."""

    identity: str


class Listing(Named):
    """The arguments of `list_tools`."""

    tool_type: str | None = None


class ToolCall(Named):
    """The arguments of `call_tool`."""

    tool_name: str
    arguments: dict[str, Any] | None = None


class Context(Body):
    """The arguments of `get_session_mapping`."""

    session_ctx_id: str


class Nothing(Body):
    """No arguments."""


class Manager:
    """Answers the manager's routes."""

    def __init__(self, halls: Halls, register: Register, boxes: Boxes, timeout: float) -> None:
        self._halls = halls
        self._register = register
        self._boxes = boxes
        self._timeout = timeout

    def routes(self) -> list[Route]:
        """The table of routes."""
        named: dict[str, tuple[type[Body], Callable[[Tenant, Any], Awaitable[object]], str]] = {
            "create_from_pool": (Creation, self.create, "Take a sandbox of the kind `sandbox_type`; its identity."),
            "create": (Creation, self.create, "The same; files of the server cannot be mounted."),
            "release": (Named, self.release, "End a sandbox and every instance in it."),
            "start": (Named, self.start, "True where the sandbox exists: it needs no start."),
            "stop": (Named, self.stop, "Release every instance in a sandbox."),
            "get_status": (Named, self.get_status, "`running`."),
            "check_health": (Named, self.check_health, "Whether a sandbox's environment is up."),
            "get_info": (Named, self.get_info, "The record of a sandbox."),
            "list_tools": (Listing, self.list_tools, "The tools of `call_tool`, with their schemas."),
            "call_tool": (ToolCall, self.call_tool, "Create, step, evaluate or release an instance in a sandbox."),
            "add_mcp_servers": (Named, self.add_mcp_servers, "Refused: a training sandbox has its own tools only."),
            "get_session_mapping": (Context, self.get_session_mapping, "The sandboxes taken in a context."),
            "list_session_keys": (Nothing, self.list_session_keys, "The contexts of this token's sandboxes."),
            "cleanup": (Nothing, self.cleanup, "End all sandboxes of this token."),
        }
        return [
            Route(f"/{name}", body, _wrapped(handler), summary, "manager", twin=True, chosen_by=_choice(body))
            for name, (body, handler, summary) in named.items()
        ]

    async def create(self, tenant: Tenant, body: Creation) -> object:
        for name in ("mount_dir", "storage_path"):
            if getattr(body, name):
                raise Refusal(400, f"{name} names files of the server, which a client cannot choose")
        given = {name: value for name, value in (body.environment or {}).items() if name not in IGNORED}
        if other := sorted(given.keys() - {SUB_TYPE}):
            raise Refusal(400, f"the variable {other[0]!r} changes nothing here; {SUB_TYPE} may be given")
        meta = body.meta or {}
        if len(orjson.dumps(meta)) > MAX_META:
            raise Refusal(400, f"meta is kept with the sandbox: {MAX_META} bytes of JSON at most")
        hall = self._halls.find(body.sandbox_type)
        return self._boxes.take(tenant, hall.environment, given, meta).name

    async def release(self, tenant: Tenant, body: Named) -> object:
        self._boxes.release(tenant, body.identity)
        return True

    async def start(self, tenant: Tenant, body: Named) -> object:
        return bool(self._boxes.find(tenant, body.identity))

    async def stop(self, tenant: Tenant, body: Named) -> object:
        box = self._boxes.find(tenant, body.identity)
        self._register.release_all(box.owner, "Its sandbox was stopped.")
        return True

    async def get_status(self, tenant: Tenant, body: Named) -> object:
        self._boxes.find(tenant, body.identity)
        return "running"

    async def check_health(self, tenant: Tenant, body: Named) -> object:
        return self._halls.find(self._boxes.find(tenant, body.identity).environment).alive

    async def get_info(self, tenant: Tenant, body: Named) -> object:
        box = self._boxes.find(tenant, body.identity)
        return {
            "session_id": box.name,
            "container_id": box.name,
            "container_name": box.name,
            "url": "",
            "ports": [],
            "mount_dir": "",
            "storage_path": None,
            "runtime_token": "",
            "version": f"rollout/{box.environment}",
            "meta": dict(box.meta),
            "timeout": self._timeout,
            "sandbox_type": box.environment,
            "state": "running",
            "session_ctx_id": box.context,
            "last_active_at": box.called,
            "instances": self._register.names(box.owner),
        }

    async def list_tools(self, tenant: Tenant, body: Listing) -> object:
        self._boxes.find(tenant, body.identity)
        return described(body.tool_type)

    async def call_tool(self, tenant: Tenant, body: ToolCall) -> object:
        box = self._boxes.find(tenant, body.identity)
        given = checked_arguments(body.tool_name, body.arguments or {})
        if body.tool_name in {"get_env_profile", "get_task_ids"}:
            split = {"split": given["split"] or "train"}
            return await self._halls.tasks(_served(box, given["env_type"]), split, {**os.environ, **box.variables})
        name = given["instance_id"]
        if not (name is None or isinstance(name, str)):
            raise Refusal(400, "an instance_id is a text")
        if body.tool_name == "create_instance":
            return await self._create_instance(box, name, given)
        if not name:
            raise Refusal(400, "instance_id is required")
        if body.tool_name == "release_instance":
            return self._register.release(box.owner, name)
        with self._register.calling(box.owner, name, step=body.tool_name == "step") as instance:
            match body.tool_name:
                case "step":
                    return await instance.step(given["action"], given["params"])
                case "evaluate":
                    return await instance.evaluate(given["params"])
                case _:
                    return instance.tools()

    async def _create_instance(self, box: Box, name: str | None, given: dict[str, Any]) -> object:
        if not (isinstance(given["task_id"], str) and given["task_id"]):
            raise Refusal(400, "task_id is required")
        hall = self._halls.find(_served(box, given["env_type"]))
        return await self._register.create(box.owner, hall, name, given["task_id"], given["params"] or {})

    async def add_mcp_servers(self, tenant: Tenant, body: Named) -> object:
        raise Refusal(400, "a training sandbox has the tools of its environment and takes no others")

    async def get_session_mapping(self, tenant: Tenant, body: Context) -> object:
        return [box.name for box in self._boxes.of(tenant) if box.context == body.session_ctx_id]

    async def list_session_keys(self, tenant: Tenant, body: Nothing) -> object:
        return sorted({box.context for box in self._boxes.of(tenant)})

    async def cleanup(self, tenant: Tenant, body: Nothing) -> object:
        for box in self._boxes.of(tenant):
            self._boxes.release(tenant, box.name)
        return None


def _served(box: Box, asked: object) -> str:
    """The box's environment, which a call may name. Raises Refusal (400)."""
    if asked in (None, "", "default", box.environment):
        return box.environment
    raise Refusal(400, f"this sandbox serves {box.environment}, not {str(asked)[:80]}")


def _choice(body: type[Body]) -> str | None:
    """The field that tells a call of this route from one of the environment service's, where their paths are equal."""
    return "identity" if issubclass(body, Named) else "sandbox_type" if body is Creation else None


def _wrapped(handler: Callable[[Tenant, Any], Awaitable[object]]) -> Callable[[Tenant, Any], Awaitable[object]]:
    async def wrapped(tenant: Tenant, body: Any) -> object:
        return {"data": await handler(tenant, body)}

    return wrapped

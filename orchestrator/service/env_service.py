"""The routes of AgentScope Runtime's environment service: one request model, success shapes as the original's.

A missing instance is 404 and a taken id 409, where the original answers 400 and replaces the live one; `release` of
what is not there stays a 200 that says false. Parameters that name files of the server are refused.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pydantic import Field

from orchestrator.service.refusals import Refusal
from orchestrator.service.register import Owner
from orchestrator.service.routes import Body, Route

if TYPE_CHECKING:
    from orchestrator.service.halls import Halls
    from orchestrator.service.register import Register
    from orchestrator.service.tenants import Tenant


class ServiceRequest(Body):
    """What every route of the environment service takes; `messages` of a step is the action."""

    env_type: str | None = None
    task_id: str | None = None
    instance_id: str | None = None
    messages: dict[str, Any] = Field(default_factory=dict)
    params: dict[str, Any] = Field(default_factory=dict)


class EnvService:
    """Answers the routes for instances that lie in no box."""

    def __init__(self, halls: Halls, register: Register) -> None:
        self._halls = halls
        self._register = register

    def routes(self) -> list[Route]:
        """The table of routes."""
        said = {
            "get_env_profile": (self.get_env_profile, "The task ids of `params.split` (default train)."),
            "create": (self.create, "Open an instance of `task_id`; `instance_id` may be chosen by the client."),
            "step": (self.step, "Run the action in `messages`, an assistant message."),
            "evaluate": (self.evaluate, "Grade an instance as it stands; `params.sparse` asks for a bare number."),
            "get_info": (self.get_info, "The tools of an instance, for people."),
            "release": (self.release, "End an instance; false where there is none."),
        }
        return [
            Route(f"/{name}", ServiceRequest, handler, summary, "env_service")
            for name, (handler, summary) in said.items()
        ]

    async def get_env_profile(self, tenant: Tenant, body: ServiceRequest) -> object:
        return _success(await self._halls.tasks(body.env_type, body.params, os.environ))

    async def create(self, tenant: Tenant, body: ServiceRequest) -> object:
        hall = self._halls.find(body.env_type)
        task = _given("task_id", body.task_id)
        return _success(await self._register.create(Owner(tenant), hall, body.instance_id, task, body.params))

    async def step(self, tenant: Tenant, body: ServiceRequest) -> object:
        name = _given("instance_id", body.instance_id)
        with self._register.calling(Owner(tenant), name, step=True) as instance:
            return _success(await instance.step(body.messages, body.params))

    async def evaluate(self, tenant: Tenant, body: ServiceRequest) -> object:
        with self._register.calling(Owner(tenant), _given("instance_id", body.instance_id)) as instance:
            return _success(await instance.evaluate(body.params))

    async def get_info(self, tenant: Tenant, body: ServiceRequest) -> object:
        with self._register.calling(Owner(tenant), _given("instance_id", body.instance_id)) as instance:
            return _success(instance.tools())

    async def release(self, tenant: Tenant, body: ServiceRequest) -> object:
        released = self._register.release(Owner(tenant), _given("instance_id", body.instance_id))
        return {"success": released, "data": None}


def _given(name: str, value: str | None) -> str:
    if not value:
        raise Refusal(400, f"{name} is required")
    return value


def _success(data: object) -> dict[str, object]:
    return {"success": True, "data": data}

"""What the HTTP routes share: a route as data, and the one way a request is read, admitted, called and answered.

Always true: a body is bounded in size and time, is a JSON object and is validated before anything is done; whatever a
handler raises becomes `{"detail": text}` with the status that `refusals` gives, never a traceback; a client that hangs
up cancels its call. The OpenAPI document is made of the same table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.service.refusals import Refusal, refusal

if TYPE_CHECKING:
    from orchestrator.service.limits import ServiceLimits
    from orchestrator.service.tenants import Admission, Tenant, Tenants


class Body(BaseModel):
    """A request's body; fields that it does not know are ignored, as the originals do."""

    model_config = ConfigDict(extra="ignore", strict=True)


Handler = Callable[["Tenant", Any], Awaitable[object]]
"""Answers with what is sent as JSON."""


@dataclass(frozen=True, slots=True)
class Route:
    """`POST path`: `body` is its model, `summary` a sentence for the OpenAPI document."""

    path: str
    body: type[Body]
    handler: Handler
    summary: str
    tag: str
    twin: bool = False
    """Whether `path_async` does the same."""
    chosen_by: str | None = None
    """The field whose presence chooses this route where another one has the same path."""

    @property
    def paths(self) -> list[str]:
        """Where it is found."""
        return [self.path, f"{self.path}_async"] if self.twin else [self.path]


JSON: Final = "application/json"


def answer(value: object, status: int = 200, *, retry_after: int | None = None) -> web.Response:
    """A JSON response."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(body=orjson.dumps(value), status=status, content_type=JSON, headers=headers)


def refused(error: Refusal) -> web.Response:
    """What a refusal looks like."""
    return answer({"detail": str(error)}, error.status, retry_after=error.retry_after)


class Gate:
    """Turns routes into aiohttp's handlers."""

    def __init__(self, tenants: Tenants, admission: Admission, limits: ServiceLimits) -> None:
        self._tenants = tenants
        self._admission = admission
        self._limits = limits

    def handler(self, routes: Sequence[Route]) -> Callable[[web.Request], Awaitable[web.Response]]:
        """The handler of the routes that have one path in common; the last one is meant where no field chooses."""

        async def handle(request: web.Request) -> web.Response:
            tenant = self.tenant(request)
            given = await _object(request, self._limits.body_s)
            route = next((route for route in routes if route.chosen_by in given), routes[-1])
            body = _validated(route.body, given)
            with self._admission.call():
                async with asyncio.timeout(self._limits.call_s):
                    return answer(await route.handler(tenant, body))

        return handle

    def tenant(self, request: web.Request) -> Tenant:
        """Who asks. Raises Refusal (401)."""
        return self._tenants.identify(request.headers.get("Authorization"))


@web.middleware
async def errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
    """The boundary: every failure becomes a JSON answer."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        words = {404: "Not Found", 405: "Method Not Allowed", 413: "the request's body is too large"}
        response = answer({"detail": words.get(error.status, error.reason)}, error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception as error:  # noqa: BLE001  # this is the boundary: a client gets words, the log the trace
        return refused(refusal(error))


async def _object(request: web.Request, seconds: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(None if request.content.is_eof() else seconds):  # most are here
            raw = await request.read()
    except TimeoutError:
        raise Refusal(408, f"the request's body has not come within {seconds:g} s") from None
    except (ValueError, web.RequestPayloadError) as error:
        raise Refusal(400, f"the request's body cannot be read: {error}") from None
    try:
        value = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError as error:
        raise Refusal(422, f"the request's body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(422, "the request's body must be a JSON object")
    return value


def _validated(model: type[Body], value: dict[str, Any]) -> Body:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(422, f"{where or 'the body'}: {first['msg']}") from None

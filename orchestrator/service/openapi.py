"""The OpenAPI document of a service, made of its table of routes."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.service.routes import Route

VERSION: Final = version("rollout-orchestrator")
_REFUSALS: Final = {
    "400": "The request asks for what cannot be.",
    "401": "A bearer token is missing, or another one is wanted.",
    "404": "No such instance or sandbox.",
    "408": "The body came too slowly.",
    "409": "The id is taken.",
    "413": "The body is too large.",
    "422": "The body is not what the schema says, or the action ends every sandbox that it is tried in.",
    "429": "A quota of this token is used up; see Retry-After.",
    "500": "The environment's own code failed.",
    "503": "No room, or no sandbox, now; see Retry-After.",
}
_GETS: Final = {
    "/healthz": ("Whether every environment has a sandbox up, as text.", ("200", "503")),
    "/health": ("The same as JSON, with counts.", ("200", "503")),
    "/wire": ("This project's own wire: a WebSocket; `?env=` names the environment.", ("101", "400", "401", "503")),
}
_ANSWERS: Final = {"env_service": ["success", "data"], "manager": ["data"]}
"""What is in the answers of the routes with a tag."""


def document(routes: Iterable[Route], *, bearer: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `bearer` says whether a token is asked for."""
    paths: dict[str, Any] = {}
    for route in routes:
        for path in route.paths:
            operation = _operation(route, bearer=bearer)
            there = paths.get(path)
            paths[path] = {"post": _either(there["post"], operation) if there else operation}
    for path, (summary, statuses) in _GETS.items():
        responses = {status: {"description": _REFUSALS.get(status, "Yes.")} for status in statuses}
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}} if bearer else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rollout serve", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {"Detail": _DETAIL}, "securitySchemes": schemes},
    }


_DETAIL: Final = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}


def _operation(route: Route, *, bearer: bool) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Detail"}}}}
    schema = route.body.model_json_schema()
    answer = {"type": "object", "required": _ANSWERS[route.tag]}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "tags": [route.tag],
        "requestBody": {"required": "required" in schema, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "Done.", "content": {"application/json": {"schema": answer}}},
            **{status: {"description": words, **error} for status, words in _REFUSALS.items()},
        },
    }
    return operation | ({"security": [{"bearer": []}]} if bearer else {})


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two routes of one path, told apart by their bodies."""
    schemas = [each["requestBody"]["content"]["application/json"]["schema"] for each in (one, other)]
    summary = f"{one['summary']} Or: {other['summary']}"
    body = {"required": False, "content": {"application/json": {"schema": {"anyOf": schemas}}}}
    return {**one, "summary": summary, "tags": [*one["tags"], *other["tags"]], "requestBody": body}

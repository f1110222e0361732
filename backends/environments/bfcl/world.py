"""The simulators of one task and the calls made on them.

A `World` owns its simulators: they are upstream's classes, loaded from a configuration parsed for them alone, and
nothing that can change is shared with another world. Upstream lets all instances of a process share some objects
(extensions of the long-context data, mutable default arguments); a world has copies of those, in its `Commons`. Only a
grade lets two worlds share one, because upstream's checker runs answer and truth in one process and its verdict shows.

A call is a name and plain values; the name is looked up among the documented methods of the task's simulators, so no
text is ever evaluated and no private method is reachable. Its result is text, as upstream renders it, and depends on
nothing but the calls before it (one exception: the age that verify_traveler_information reckons with is today's).
"""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from backends.environments.bfcl import data, upstream
from backends.environments.bfcl.guards import GUARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from backends.environments.bfcl.guards import Guard

MAX_RESULT: Final = 256 * 1024
"""The length of a result in characters; a longer one is named, not shown."""

_EXTENSIONS: Final = {
    "TravelAPI": (("credit_card_list", "CREDIT_CARD_EXTENSION"), ("booking_record", "BOOKING_RECORD_EXTENSION"))
}
"""Attributes whose values upstream takes from its module without a copy when it loads a long context."""


class Commons:
    """Own copies of what upstream keeps once per process. Asked for the same object twice, gives the same copy."""

    __slots__ = ("_copies",)

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}

    def own(self, shared: Any) -> Any:
        """The copy of a module-level object."""
        found = self._copies.get(id(shared))
        if found is None:
            found = self._copies[id(shared)] = copy.deepcopy(shared)
        return found


class Recorded(NamedTuple):
    """A call as it is kept: `arguments` as JSON text, which no simulator can change."""

    name: str
    arguments: str | bytes


class Method(NamedTuple):
    """How to call one documented method."""

    owner: str
    """The simulator it belongs to."""
    parameters: tuple[str, ...]
    guard: Guard | None
    defaults: tuple[tuple[str, Any], ...]
    """Parameters whose default value is mutable, with it."""
    settle: Callable[[Any], None] | None
    """Puts what the result lists in hash order into a fixed one."""


@cache
def methods(simulators: tuple[str, ...]) -> Mapping[str, Method]:
    """The documented methods of a task's simulators by name; no two simulators of a task share one."""
    return {
        document["name"]: _method(owner, document["name"]) for owner in simulators for document in data.documents(owner)
    }


def _method(owner: str, name: str) -> Method:
    _, *parameters = inspect.signature(getattr(upstream.simulator(owner), name)).parameters.values()
    return Method(
        owner,
        tuple(parameter.name for parameter in parameters),
        GUARDS.get((owner, name)),
        tuple((p.name, p.default) for p in parameters if isinstance(p.default, list | dict | set)),
        _SETTLE.get(name),
    )


def _sort_listing(beginning: str) -> Callable[[Any], None]:
    """Upstream puts a set into this error, in the order of the process's hash seed: name its members sorted."""

    def settle(result: Any) -> None:
        error = result.get("error") if isinstance(result, dict) else None
        if isinstance(error, str) and error.startswith(beginning):
            listed = error[len(beginning) :].removeprefix("{").removesuffix("}").split(", ")
            result["error"] = beginning + ", ".join(sorted(listed))

    return settle


_SETTLE: Final = {
    "book_flight": _sort_listing("Invalid travel class. Must be one of "),
    "edit_ticket": _sort_listing("Invalid fields for update: "),
}


class World:
    """A task's simulators, loaded. `configuration` maps their names to JSON."""

    __slots__ = ("_commons", "_methods", "simulators")

    def __init__(
        self, simulators: tuple[str, ...], configuration: Mapping[str, bytes], *, long_context: bool, commons: Commons
    ) -> None:
        self._commons = commons
        self._methods = methods(simulators)
        self.simulators = {
            name: self._load(name, configuration.get(name, b"{}"), long_context=long_context) for name in simulators
        }

    def _load(self, name: str, configuration: bytes, *, long_context: bool) -> Any:
        simulator = upstream.simulator(name)()
        if upstream.stateless(name):
            return simulator
        simulator._load_scenario(  # noqa: SLF001 - upstream has no public name for it
            orjson.loads(configuration), long_context=long_context
        )
        if long_context:
            for attribute, extension in _EXTENSIONS.get(name, ()):
                records = getattr(simulator, attribute)
                for key, shared in upstream.extension(extension).items():
                    if records[key] is shared:
                        records[key] = self._commons.own(shared)
        return simulator

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a method and render its result; whatever goes wrong is a result too. `arguments` must be fresh."""
        method = self._methods.get(name)
        if method is None:
            return f"Error during execution: there is no function {name!r}; call one of those in the list of tools"
        simulator = self.simulators[method.owner]
        if method.guard is not None and (refusal := method.guard(simulator, arguments)) is not None:
            return f"Error during execution: {refusal}"
        for parameter, shared in method.defaults:
            if parameter not in arguments:
                arguments[parameter] = self._commons.own(shared)
        try:
            result = getattr(simulator, name)(**arguments)
            if method.settle is not None:
                method.settle(result)
            text = render(result)
        except Exception as error:  # noqa: BLE001 - a simulator may raise anything; upstream shows it to the agent
            text = f"Error during execution: {error}"
        if len(text) > MAX_RESULT:
            return f"Error during execution: the result has {len(text)} characters; at most {MAX_RESULT} are shown"
        return text

    def replay(self, call: Recorded) -> str:
        """Call a method as it was recorded."""
        return self.call(call.name, orjson.loads(call.arguments))


def render(result: Any) -> str:
    """A result as upstream renders it: text as it is, an object as JSON where it can be, anything else as `str`."""
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError, RecursionError):
            return str(result)
    return str(result)

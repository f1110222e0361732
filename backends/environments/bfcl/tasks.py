"""A task as sessions share it: everything that does not change while it is played.

Sessions of one task hold the same object; the tasks opened last are kept, so that a group, or the next epoch, parses
nothing again. Tool sets of multi-turn tasks are kept for good: 146 sets serve all 800 tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Final

import orjson

from backends.environments.bfcl import data, splits, truth, upstream
from backends.server.environment import Toolset

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.bfcl.world import Recorded

Json = dict[str, Any]

KEPT: Final = 1024
"""How many tasks are kept."""


@dataclass(frozen=True, slots=True)
class MultiTurnTask:
    """A conversation with simulators. `turns` holds each turn's messages from the user."""

    id: str
    simulators: tuple[str, ...]
    configuration: Mapping[str, bytes]
    turns: Sequence[Sequence[Json]]
    tools: Sequence[Json]
    toolset: Toolset
    added: Mapping[int, Sequence[Json]]
    """Tools that appear at a turn."""

    @property
    def long_context(self) -> bool:
        """Whether the simulators are loaded with upstream's long context."""
        return data.category_of(self.id) == "multi_turn_long_context"

    @property
    def truth(self) -> Sequence[Sequence[Recorded]]:
        """The ground truth's calls per turn."""
        return truth.calls(self.id, self.simulators)


@dataclass(frozen=True, slots=True)
class SingleTurnTask:
    """One question that is answered by one message."""

    id: str
    category: str
    messages: Sequence[Json]
    tools: Sequence[Json]
    toolset: Toolset | None
    """None where the question comes without a function."""


@dataclass(frozen=True, slots=True)
class MemoryTask:
    """A question about what was said in conversations. All questions of a scenario share its conversations."""

    id: str
    category: str
    scenario: str
    memory: str
    """The simulator that is the agent's memory."""
    conversations: Sequence[Sequence[Sequence[Json]]]
    """The messages from the user of each turn of each conversation; the last conversation is the question."""
    tools: Sequence[Json]
    toolset: Toolset


Task = MultiTurnTask | SingleTurnTask | MemoryTask


@lru_cache(maxsize=KEPT)
def load(task: str) -> Task:
    """A task by its id. Raises EnvironmentFault: unknown, or it cannot run here."""
    category = splits.check(task)
    entry = data.entry(task)
    if category.startswith("memory"):
        return _memory(task, entry, category)
    return _multi_turn(entry) if category.startswith("multi_turn") else _single_turn(entry, category)


def _multi_turn(entry: Json) -> MultiTurnTask:
    simulators = tuple(entry["involved_classes"])
    held_out = {int(turn): tuple(names) for turn, names in entry.get("missed_function", {}).items()}
    by_name = {tool["function"]["name"]: tool for name in simulators for tool in _tools(name)}
    tools, toolset = _opening(simulators, tuple(name for names in held_out.values() for name in names))
    announcement = [{"role": "user", "content": upstream.functions_added_text()}]
    return MultiTurnTask(
        id=entry["id"],
        simulators=simulators,
        configuration={name: orjson.dumps(value) for name, value in entry["initial_config"].items()},
        turns=[announcement if turn in held_out else messages for turn, messages in enumerate(entry["question"])],
        tools=tools,
        toolset=toolset,
        added={turn: [by_name[name] for name in names] for turn, names in held_out.items()},
    )


@cache
def _tools(simulator: str) -> Sequence[Json]:
    return upstream.openai_tools("multi_turn_base_0", data.documents(simulator))


@cache
def _opening(simulators: tuple[str, ...], held_out: tuple[str, ...]) -> tuple[Sequence[Json], Toolset]:
    tools = [tool for name in simulators for tool in _tools(name) if tool["function"]["name"] not in held_out]
    return tools, Toolset(tools)


def _single_turn(entry: Json, category: str) -> SingleTurnTask:
    tools = upstream.openai_tools(entry["id"], entry["function"])
    return SingleTurnTask(entry["id"], category, entry["question"][0], tools, Toolset(tools) if tools else None)


def _memory(task: str, entry: Json, category: str) -> MemoryTask:
    memory = category.replace("memory", "MemoryAPI", 1)
    (question,) = entry["question"]
    tools, toolset = _opening((memory,), ())
    return MemoryTask(
        id=task,
        category=category,
        scenario=entry["scenario"],
        memory=memory,
        conversations=[*data.conversations(entry["scenario"]), [upstream.with_answer_format(question)]],
        tools=tools,
        toolset=toolset,
    )

"""Reading a run: its episodes, their conversations, its totals. Works while the run goes on, and after it.

    with Run.open("runs/x") as run:
        for trajectory in run.episodes():
            print(trajectory.key, trajectory.reward)

Reads only; any number of readers may be open. All methods block on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import orjson

from orchestrator import records
from orchestrator.errors import UnknownName
from orchestrator.records import ConversationView, EpisodeBuffer
from orchestrator.rundir import RunDirectory
from orchestrator.store import StoreReader
from orchestrator.types import EpisodeKey, Observation

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from orchestrator.store import RunMeta, Totals
    from orchestrator.types import Generation, Group, Trajectory


@dataclass(frozen=True, slots=True)
class Turn:
    """What the agent was shown and what it did then.

    `messages` are the environment's, `reward` and `done` what came with them: of the action before. `tools` is the
    digest of the tool set that this turn opened, `tools_added` the tools that appeared. With `new_conversation` the
    agent was shown nothing of the turns before. `action` is the agent's
    message; None at the end of an episode, or where it was cut off before acting. `generation` is None where no model
    was called.
    """

    number: int
    messages: list[dict[str, Any]]
    reward: float
    done: bool
    tools: str | None
    tools_added: list[Any]
    new_conversation: bool
    action: dict[str, Any] | None
    generation: Generation | None


class Run:
    """A run directory, open for reading. A context manager."""

    def __init__(self, directory: RunDirectory) -> None:
        """Use `open`."""
        self.directory = directory
        self._store = StoreReader(directory.store)
        self._toolsets: dict[str, bytes] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run. Raises UsageError where there is none, SchemaMismatch for one of another version."""
        return cls(RunDirectory(path))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Run {self.meta.run} in {self.directory.path}>"

    def close(self) -> None:
        """Close the store. Idempotent."""
        self._store.close()

    @property
    def meta(self) -> RunMeta:
        """What the run is."""
        return self._store.meta

    @property
    def state(self) -> Literal["running", "finished"]:
        """`running` also means: interrupted, and to be resumed."""
        return self._store.state

    @property
    def plan(self) -> dict[str, Any] | None:
        """What the run is to collect."""
        return self._store.plan

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run reported at its end; None before."""
        return self._store.summary

    def episodes(self, order: Literal["commit", "key"] = "commit") -> Iterator[Trajectory]:
        """All trajectories, lazily, in the order in which they were stored, or of their keys."""
        return self._store.episodes(order)

    def episode(self, key: EpisodeKey | str) -> Trajectory:
        """One trajectory, by its key or by `TASK`, `TASK/GROUP` or `TASK/GROUP/SAMPLE`. Raises UnknownName."""
        for candidate in [key] if isinstance(key, EpisodeKey) else _readings(key):
            trajectory = self._store.episode(candidate)
            if trajectory is not None:
                return trajectory
        first = next((str(trajectory.key) for trajectory in self.episodes()), None)
        hint = "none is stored yet" if first is None else f"stored are such as {first}"
        raise UnknownName(f"no episode {key} in {self.directory.path}; {hint}")

    def groups(self) -> Iterator[Group]:
        """All released groups in the order of their release, lazily."""
        return self._store.groups()

    def totals(self) -> Totals:
        """Sums over all that is stored."""
        return self._store.totals()

    def toolsets(self) -> dict[str, bytes]:
        """All tool sets by digest, each a JSON array."""
        return self._store.toolsets()

    def transcript(self, trajectory: Trajectory) -> list[Turn]:
        """The conversation turn by turn; empty for an episode that never opened."""
        return list(_turns(trajectory.buffer))

    def to_openai(self, trajectory: Trajectory) -> dict[str, Any]:
        """The whole episode as one row of OpenAI messages and tools, with its key and its result.

        An episode of several conversations has `conversations` too: where in the messages each of them begins.
        """
        view = self._view(trajectory)
        row: dict[str, Any] = {
            "key": str(trajectory.key),
            "task": trajectory.key.task,
            "messages": view.messages(),
            "tools": view.tools(),
            "reward": trajectory.reward,
            "outcome": trajectory.outcome.value,
            "stop_reason": trajectory.stop_reason.value,
            "steps": trajectory.steps,
        }
        if len(beginnings := view.beginnings()) > 1:
            row["conversations"] = beginnings
        return row

    def _view(self, trajectory: Trajectory) -> ConversationView:
        buffer = EpisodeBuffer.restore(trajectory.buffer)
        opening = next(_turns(trajectory.buffer), None)
        if opening is not None and opening.tools is not None and opening.tools not in self._toolsets:
            self._toolsets = self._store.toolsets()
        return ConversationView(buffer, self._toolsets, whole=True)


def _readings(text: str) -> Iterator[EpisodeKey]:
    """The keys that a text may mean: a task's name may hold slashes and end in numbers."""
    head, _, sample = text.rpartition("/")
    task, _, group = head.rpartition("/")
    if task and group.isdecimal() and sample.isdecimal():
        yield EpisodeKey(task, int(group), int(sample))
    if head and sample.isdecimal():
        yield EpisodeKey(head, int(sample), 0)
    yield EpisodeKey(text, 0, 0)


def _turns(buffer: bytes) -> Iterator[Turn]:
    shown: Observation | None = None
    action: dict[str, Any] | None = None
    generation: Generation | None = None
    number = 0
    for record in records.records(buffer, records.read_header(buffer)[1]):
        if record.kind == records.OBSERVATION:
            if shown is not None:
                yield _turn(number, shown, action, generation)
                number += 1
            shown, action, generation = records.read_observation(buffer, record), None, None
        elif record.kind == records.ACTION:
            action = _action(buffer[record.start : record.end])
        elif record.kind == records.GENERATION:
            generation = records.read_generation(buffer[record.start : record.end])
    if shown is not None:
        yield _turn(number, shown, action, generation)


def _turn(number: int, shown: Observation, action: dict[str, Any] | None, generation: Generation | None) -> Turn:
    body = records.parse_observation(shown.body)
    return Turn(
        number=number,
        messages=body.get("messages", []),
        reward=shown.reward,
        done=shown.done,
        tools=body.get("tools"),
        tools_added=body.get("tools_added", []),
        new_conversation=body.get("new_conversation") is True,
        action=action,
        generation=generation,
    )


def _action(raw: bytes) -> dict[str, Any]:
    """A policy may have answered anything: what is no message is shown as one's content."""
    try:
        action = orjson.loads(raw)
    except orjson.JSONDecodeError:
        action = None
    return action if isinstance(action, dict) else {"role": "assistant", "content": raw.decode("utf-8", "replace")}

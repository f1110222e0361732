"""Upstream's data files, read one line at a time.

A category is a JSON Lines file of entries and, for most, a file of possible answers whose lines stand in the same
order. Only the positions of the lines stay in memory; an entry is parsed when asked for. Nothing here is ever changed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import orjson

from backends.environments.bfcl import upstream
from backends.server.environment import unknown_task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_PREFIX = b'{"id": "'


class Lines:
    """Where each line of a JSON Lines file begins, and the ids of its lines in the file's order.

    Several categories may share a file, whose ids then begin with its `stem` instead of the category.
    """

    __slots__ = ("_path", "_places", "ids")

    def __init__(self, folder: Path, category: str) -> None:
        stem = "memory" if category.startswith("memory_") else category
        self._path = folder / f"BFCL_v4_{stem}.json"
        self._places: dict[str, tuple[int, int]] = {}
        start = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            self._places[_id(line).replace(stem, category, 1)] = (start, len(line))
            start += len(line)
        self.ids = tuple(self._places)

    def read(self, name: str) -> Any:
        """The parsed line with this id. Raises KeyError where there is none."""
        start, length = self._places[name]
        with self._path.open("rb") as file:
            file.seek(start)
            return orjson.loads(file.read(length))


def _id(line: bytes) -> str:
    if line.startswith(_PREFIX):
        return line[len(_PREFIX) : line.index(b'"', len(_PREFIX))].decode()
    found: str = orjson.loads(line)["id"]
    return found


def category_of(task: str) -> str:
    """The category that a task's id names, as upstream reads it."""
    return task.rpartition("_")[0]


@cache
def lines(category: str) -> Lines:
    """The entries of a category."""
    return Lines(upstream.package() / "data", category)


@cache
def _answers(category: str) -> Lines:
    return Lines(upstream.package() / "data" / "possible_answer", category)


def entry(task: str) -> dict[str, Any]:
    """A task's entry, fresh. Raises EnvironmentFault where the category has no such task."""
    category = category_of(task)
    try:
        found: dict[str, Any] = lines(category).read(task)
    except KeyError:
        first = lines(category).ids[0]
        raise unknown_task(task, f"{category} has {len(lines(category).ids)} tasks, the first is {first}") from None
    return found


def answer(task: str) -> list[Any]:
    """A task's ground truth, fresh: calls per turn (multi-turn), possible answers (single-turn), or texts (memory)."""
    found: list[Any] = _answers(category_of(task)).read(task)["ground_truth"]
    return found


@cache
def conversations(scenario: str) -> Sequence[Sequence[Sequence[dict[str, Any]]]]:
    """The conversations that come before the questions of a memory's scenario: the user's messages of each turn."""
    path = upstream.package() / "data" / "memory_prereq_conversation" / f"memory_{scenario}.json"
    return [orjson.loads(line)["question"] for line in path.read_bytes().splitlines()]


@cache
def _document_lines(simulator: str) -> tuple[bytes, ...]:
    path = upstream.package() / "data" / "multi_turn_func_doc" / upstream.document_file(simulator)
    return tuple(path.read_bytes().splitlines())


def documents(simulator: str) -> list[dict[str, Any]]:
    """The function documents of a simulator, fresh."""
    return [orjson.loads(line) for line in _document_lines(simulator)]


def count(name: str) -> int:
    """How many lines a data file has."""
    return len((upstream.package() / "data" / f"BFCL_v4_{name}.json").read_bytes().splitlines())


def format_sensitivity_count() -> int:
    """How many questions are asked in several prompt formats."""
    path = upstream.package() / "data" / "BFCL_v4_format_sensitivity.json"
    return sum(len(ids) for ids in orjson.loads(path.read_bytes()).values())

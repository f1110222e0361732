"""What a scenario is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Say = Callable[[str], None]
    """Takes one line of progress, for people."""
    Row = dict[str, Any]
    """One measurement, as it goes into the JSON file."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to do. None leaves it to the scenario; smaller figures than its own are quick and less exact."""

    seed: int = 0
    episodes: int | None = None
    kills: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a scenario found.

    `result` is printed and holds the figures; `rounds` holds every measurement that they were made of; `settings` is
    what was really run.
    """

    result: Mapping[str, Any]
    rounds: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    evidence: bool = False
    """Whether the working directory shows something that should not be, and must be kept."""


class Scenario(Protocol):
    """Measures in `work`, an empty directory on the disk where results will lie. Raises RolloutError."""

    async def __call__(self, sizes: Sizes, work: Path, say: Say) -> Report: ...

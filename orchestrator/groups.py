"""Emits each group once, whole or explicitly partial. Pure; owned by the scheduler.

Always true: a group is open from its first ended sample to its last; it is released with its last sample, in the same
commit; a sample is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from orchestrator.types import GroupRelease

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.types import EpisodeKey


class GroupStatistics(NamedTuple):
    """Groups with at least one ended sample and not all; groups released."""

    open: int
    released: int


@dataclass(slots=True)
class _Open:
    ended: set[int] = field(default_factory=set)
    partial: bool = False


class GroupTracker:
    """Counts ended samples per group of `size` samples."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._open: dict[tuple[str, int], _Open] = {}
        self._released = 0

    def restore(self, stored: Iterable[tuple[EpisodeKey, bool]]) -> None:
        """Samples of unreleased groups that an earlier life of the run stored: key, whether it carries a reward."""
        for key, rewarded in stored:
            self._count(key, rewarded=rewarded)

    def ended(self, key: EpisodeKey, *, rewarded: bool) -> GroupRelease | None:
        """Count an ended sample; the release, when it is the group's last."""
        group = self._count(key, rewarded=rewarded)
        if len(group.ended) < self._size:
            return None
        del self._open[key.task, key.group]
        self._released += 1
        return GroupRelease(key.task, key.group, self._size, group.partial)

    def _count(self, key: EpisodeKey, *, rewarded: bool) -> _Open:
        group = self._open.setdefault((key.task, key.group), _Open())
        if key.sample in group.ended:
            raise ValueError(f"sample {key} ended twice")
        group.ended.add(key.sample)
        group.partial = group.partial or not rewarded
        return group

    def check(self) -> None:
        """Verify the invariants."""
        for name, group in self._open.items():
            if not 0 < len(group.ended) < self._size:
                raise AssertionError(f"group {name} is open with {len(group.ended)} of {self._size} samples ended")

    def statistics(self) -> GroupStatistics:
        """Counts; cheap."""
        return GroupStatistics(len(self._open), self._released)

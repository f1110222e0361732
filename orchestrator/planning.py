"""What a run collects: a split or named tasks, resolved once into groups and stored with the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SandboxError, SandboxRefused, UnknownName, UsageError
from orchestrator.types import EpisodeSpec, GroupSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from orchestrator.pool import Pool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run collects: `groups` groups of `size` samples, dealt over `tasks` in order, round after round."""

    tasks: Sequence[str]
    groups: int
    size: int

    @property
    def episodes(self) -> int:
        """How many episodes that is."""
        return self.groups * self.size

    def specs(self) -> Iterator[GroupSpec]:
        """The groups in order; `group` counts the rounds."""
        for index in range(self.groups):
            round_, place = divmod(index, len(self.tasks))
            yield GroupSpec(index, self.tasks[place], round_, self.size)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan, and what of the split cannot run here: category -> count and needs."""

    plan: Plan
    left_out: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The stored form."""
        plan = self.plan
        left_out = {name: dict(why) for name, why in self.left_out.items()}
        return {"tasks": list(plan.tasks), "groups": plan.groups, "size": plan.size, "left_out": left_out}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Resolved:
        """Read the stored form."""
        return cls(Plan(stored["tasks"], stored["groups"], stored["size"]), stored["left_out"])


def resolve(
    tasks: Sequence[str],
    left_out: Mapping[str, Mapping[str, object]],
    split: str,
    group_size: int,
    episodes: int | None,
) -> Resolved:
    """Groups of `group_size` over the tasks: one round, or `episodes` episodes. Raises UsageError."""
    if not tasks:
        raise UsageError(f"the split {split or '(default)'!r} has no task that can run here")
    if twice := [task for task, count in Counter(tasks).items() if count > 1]:
        raise UsageError(f"{twice[0]!r} is named more than once; use group_size for more samples of a task")
    wanted = len(tasks) * group_size if episodes is None else episodes
    if wanted % group_size:
        raise UsageError(f"{wanted} episodes are not a whole number of groups of {group_size}")
    return Resolved(Plan(list(tasks), wanted // group_size, group_size), left_out)


async def probe(pool: Pool, tasks: Sequence[str], step_timeout_s: float, options: Mapping[str, object]) -> None:
    """Open each named task once, so that a misspelt one is an error before the run and not an outcome in it.

    Raises UnknownName. A task that kills its sandbox here exists; what is wrong with it is for the run to find out.
    """
    for task in dict.fromkeys(tasks):
        lease = await pool.lease()
        try:
            session, _ = await lease.sandbox.open(EpisodeSpec(task, 0, step_timeout_s, options))
            session.close()
        except SandboxRefused as refused:
            if refused.code == "unknown_task":
                raise UnknownName(refused.failure.message) from None
        except SandboxError:
            continue
        finally:
            lease.release()

"""What a run has come to: the summary of `run`, `collect` and `--json`, and the live progress of the display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole run, over all its lives; the times, rates and CPU figures are of the life that wrote it.

    Times in seconds, CPU in microseconds a step (user + system of the whole process, from the first admission to the
    last durable commit; the sandboxes' includes their descendants), memory in MiB. `state` is `finished` or
    `unfinished` (drained or cancelled: `rollout resume` goes on).
    """

    run: str
    out: str
    state: str
    environment: str
    episodes: int
    planned: int
    outcomes: Mapping[str, int]
    reward_mean: float | None
    reward_one: int
    steps: int
    wall_s: float
    episodes_per_s: float
    steps_per_s: float
    cpu_us_per_step_orchestrator: float | None
    cpu_us_per_step_sandbox: float | None
    peak_rss_mb: float
    model_calls: int
    prompt_tokens: int
    completion_tokens: int
    recovered_episodes: int
    duplicates: int
    redelivered: int
    groups: int
    failures: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the order of the fields."""
        return {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in ((name, getattr(self, name)) for name in self.__slots__)
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands now. `done` counts durable episodes of all lives; `paused` says why nothing is admitted."""

    total: int
    done: int
    running: int
    waiting: int
    uncommitted: int
    steps: int
    rewarded: int
    reward_sum: float
    outcomes: Mapping[str, int]
    failures: Mapping[str, int]
    recovered: int
    sandboxes_live: int
    sandboxes_target: int
    elapsed_s: float
    draining: bool
    paused: str | None

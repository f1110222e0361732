"""What a run has come to: the summary of `run`, `collect` and `--json`, and the live progress of the display."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from orchestrator.engine import Engine
    from orchestrator.store import Store

LEAST_SANDBOX_CPU_S: Final = 0.5
"""The kernel counts a sandbox's CPU in ticks of 10 ms: with less than this it is too coarse to divide by steps."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run has come to, in two scopes: a run has one life more for every resume.

    Of the whole run, over all its lives: `episodes`, `planned`, `outcomes`, the rewards, `steps`, `model_calls`, the
    tokens, `recovered_episodes`, `duplicates`, `redelivered`, `groups`, `lives`. Of the last life alone, which wrote
    this: `wall_s`, the rates, the CPU figures, `peak_rss_mb`, `failures`, `attempts_lost` (begun anew because their
    shard ended with their steps: their model calls were made again), and `life_episodes` and `life_steps`, from which
    its rates follow. In a run that was never resumed both are the same.

    Times in seconds, CPU in microseconds a step (user + system of the whole process, from the first admission to the
    last durable commit; the sandboxes' includes their descendants), memory in MiB. `cpu_s_sandbox` is in seconds, exact
    to 10 ms a sandbox; below LEAST_SANDBOX_CPU_S of it `cpu_us_per_step_sandbox` is None. `state` is `finished` or
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
    lives: int
    life_episodes: int
    life_steps: int
    cpu_s_sandbox: float
    attempts_lost: int = 0
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
    """Where a run stands now; `paused` says why nothing is admitted.

    `done` counts durable episodes of all lives of the run; `steps`, rewards, `outcomes`, `failures`, `recovered` and
    `elapsed_s` are of this life. `total` is 0 while the run is being prepared.
    """

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

    @property
    def done_before(self) -> int:
        """Episodes that earlier lives of the run have done."""
        return self.done + self.uncommitted - sum(self.outcomes.values())


async def summarise(
    engine: Engine, store: Store, out: str, *, stored_before: int, left_out: Mapping[str, Mapping[str, object]]
) -> Summary:
    """The summary of a run whose engine has ended. `stored_before`: episodes of earlier lives."""
    totals, counters = await store.totals(), engine.counters
    wall = max(counters.wall_end - counters.wall_start, 1e-9)
    steps, sandbox_cpu = counters.steps, counters.sandbox_cpu_s
    life_episodes = totals.episodes - stored_before
    return Summary(
        run=store.meta.run,
        out=out,
        state="finished" if engine.complete else "unfinished",
        environment=store.meta.environment,
        episodes=totals.episodes,
        planned=engine.scheduler.plan.episodes,
        outcomes={str(outcome): count for outcome, count in totals.outcomes.items()},
        reward_mean=totals.reward_mean,
        reward_one=totals.reward_one,
        steps=totals.steps,
        wall_s=wall,
        episodes_per_s=life_episodes / wall,
        steps_per_s=steps / wall,
        cpu_us_per_step_orchestrator=counters.cpu_s / steps * 1e6 if steps else None,
        cpu_us_per_step_sandbox=sandbox_cpu_per_step(sandbox_cpu, steps),
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        model_calls=totals.model_calls,
        prompt_tokens=totals.prompt_tokens,
        completion_tokens=totals.completion_tokens,
        recovered_episodes=totals.recovered,
        duplicates=totals.duplicates,
        redelivered=totals.redelivered,
        groups=totals.groups,
        lives=store.run_epoch,
        life_episodes=life_episodes,
        life_steps=steps,
        cpu_s_sandbox=sandbox_cpu,
        attempts_lost=counters.attempts_lost,
        failures={str(kind): count for kind, count in counters.failures.items()},
        left_out=left_out,
    )


def sandbox_cpu_per_step(cpu_s: float, steps: int) -> float | None:
    """Microseconds; None where too little was measured to say."""
    return cpu_s / steps * 1e6 if steps and cpu_s >= LEAST_SANDBOX_CPU_S else None

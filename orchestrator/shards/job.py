"""What a shard is told, once; and what the facade asks of whoever runs shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from orchestrator.episode import EpisodeSettings
    from orchestrator.events import Listener
    from orchestrator.protocols import Backend, Policy
    from orchestrator.shards.crew import Crew
    from orchestrator.types import EnvironmentInfo, RunId


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One run, for a shard. `resume`: what journals of earlier lives hold is wanted.

    `sandboxes` is how many a shard keeps (None: one a core of its node); `call_limit_s` as for a backend.
    """

    run: RunId
    run_epoch: int
    info: EnvironmentInfo
    settings: EpisodeSettings
    durable_steps: bool
    sandboxes: int | None
    call_limit_s: float
    resume: bool


class Shards(Protocol):
    """Runs the shards of one run somewhere, and keeps them running."""

    def opened(self, backend: Backend, policy: Policy) -> AbstractAsyncContextManager[object]:
        """Be where shards can be run, with what each needs a copy of; neither has been entered.

        Raises UsageError, Unavailable, RunFailed.
        """
        ...

    def crew(
        self, job: ShardJob, absorb: Callable[[Mapping[str, bytes]], None], emit: Listener
    ) -> AbstractAsyncContextManager[Crew]:
        """Start them where it is `opened`, with their tool sets going to `absorb`, and what becomes of them to `emit`.

        Entered once the first one is ready (on a resume: all, or a deadline has passed). Leaving ends them. Raises
        RolloutError where none can be started.
        """
        ...

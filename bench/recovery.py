"""What a kill loses: the orchestrator is killed with SIGKILL at random points and resumed, until its runs are finished.

Half of the kills fall on runs of the replay policy (steps durable in every other run), half on runs of the chat policy
with a slow fake endpoint that survives and logs its calls. A tenth as many sandboxes are killed or stopped during runs
that are otherwise left alone. Every run is compared with an undisturbed one of the same seed.

- `lost`, `duplicated`: keys missing from, or twice in, the store, the outbox, or what a consumer in another process was
  given and acknowledged. `unexpected`, `wrong_rewards`, `wrong_trajectories`: see `bench.verdict`.
- `model_calls_repeated`: calls answered more than 0.2 s before a kill (at any time, where only sandboxes were killed)
  and made again. `model_calls_repeated_in_all` counts those too that were answered later than that.
- `processes_left`: processes of a dead orchestrator that live 2 s after it; `folders_left`: what lies in the temporary
  directory of all of them at the end.
- `kills_in_flight`: kills that found some episodes stored and others not.

To falsify it: kill points are in the rounds; an undisturbed run must repeat no call; a run that ends badly, hangs or
does not finish is an error and not a count; `tests/integration/test_bench.py` breaks finished runs and is noticed.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.lives import Ward
from bench.processes import adopt_orphans, need_linux
from bench.trials import Pace, disturbed, killed
from bench.values import Report
from bench.verdict import Verdict
from bench.workloads import chat_workload, replay_workload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from bench.trials import Trial
    from bench.values import Say, Sizes
    from bench.workloads import Workload

KILLS: Final = 100
EPISODES: Final = 2000
"""Of a replay run; a chat run has a twentieth."""
CHAT_SHARE: Final = 20
CHAT_AT_LEAST: Final = 8
KILLS_A_RUN: Final = 4


async def recovery(sizes: Sizes, work: Path, say: Say) -> Report:
    """Kill and judge. Raises RunFailed where a life fails by itself, Unavailable outside of Linux."""
    need_linux("recovery")
    kills = KILLS if sizes.kills is None else sizes.kills
    episodes = EPISODES if sizes.episodes is None else sizes.episodes
    talks = max(episodes // CHAT_SHARE, CHAT_AT_LEAST)
    adopt_orphans(adopt=True)
    try:
        with tempfile.TemporaryDirectory(prefix="rollout-bench-") as temporary:
            campaign = _Campaign(Ward(Path(temporary), work / "lives.log"), work, sizes.seed, say)
            await campaign.replay(episodes, kills - kills // 2, max(1, kills // 20))
            await campaign.chat(talks, kills // 2, max(1, kills // 20))
            folders = os.listdir(temporary)
    finally:
        adopt_orphans(adopt=False)
    result = _result(campaign.trials, campaign.ward.left, folders)
    settings = {"episodes": {"replay": episodes, "chat": talks}, "processes_left": campaign.ward.left}
    rows = [trial.as_row() for trial in campaign.trials]
    return Report(result, rows, settings, evidence=not all(trial.clean for trial in campaign.trials))


class _Campaign:
    """All trials of one benchmark."""

    def __init__(self, ward: Ward, work: Path, seed: int, say: Say) -> None:
        self.ward = ward
        self.trials: list[Trial] = []
        self._work = work
        self._seed = seed
        self._say = say

    async def replay(self, episodes: int, kills: int, sandbox_kills: int) -> None:
        """Kill runs of the replay policy."""
        workload = await replay_workload(self.ward, self._work, episodes, self._seed)
        await self._disturb(workload, kills, sandbox_kills)

    async def chat(self, episodes: int, kills: int, sandbox_kills: int) -> None:
        """Kill runs of the chat policy."""
        async with chat_workload(self.ward, self._work, episodes, self._seed) as workload:
            await self._disturb(workload, kills, sandbox_kills)

    async def _disturb(self, workload: Workload, kills: int, sandbox_kills: int) -> None:
        self._say(
            f"{workload.name}: {len(workload.expected):,} episodes a run, undisturbed in "
            f"{workload.starting_s + workload.running_s:.1f} s"
        )
        rng, pace = random.Random(f"{self._seed} {workload.name}"), Pace()
        await self._until(kills, "kills", lambda out, most: killed(workload, out, self.ward, rng, most, pace))
        await self._until(
            sandbox_kills, "sandbox_kills", lambda out, most: disturbed(workload, out, self.ward, rng, most)
        )

    async def _until(self, wanted: int, what: str, trial: Callable[[Path, int], Awaitable[Trial]]) -> None:
        """Trial after trial until so many disturbances were made."""
        made = 0
        while made < wanted:
            out = self._work / f"trial-{len(self.trials)}"
            found = await trial(out, min(KILLS_A_RUN, wanted - made))
            self.trials.append(found)
            made += len(getattr(found, what))
            self._say(f"{found.workload}: {made} of {wanted} {what.replace('_', ' ')}; {_faults(found)}")
            if found.clean:
                shutil.rmtree(out)


def _faults(trial: Trial) -> str:
    return "nothing wrong" if trial.clean else f"{trial.verdict}, {trial.model_calls_repeated} model calls repeated"


def _result(trials: Sequence[Trial], left: Sequence[str], folders: Sequence[str]) -> dict[str, Any]:
    verdict = sum((trial.verdict for trial in trials), Verdict())
    kills = [kill for trial in trials for kill in trial.kills]
    return {
        "kills": len(kills),
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "model_calls_repeated": sum(trial.model_calls_repeated for trial in trials),
        "processes_left": len(left),
        "unexpected": verdict.unexpected,
        "wrong_rewards": verdict.wrong_rewards,
        "wrong_trajectories": verdict.wrong_trajectories,
        "sandbox_kills": sum(len(trial.sandbox_kills) for trial in trials),
        "kills_in_flight": sum(0 < kill["stored"] < kill["of"] for kill in kills),
        "model_calls": sum(trial.model_calls for trial in trials),
        "model_calls_repeated_in_all": sum(len(trial.repeated_after_s) for trial in trials),
        "folders_left": len(folders),
    }

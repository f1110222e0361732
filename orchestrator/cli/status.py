"""`rollout status`: how a run stands, from its directory alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import options

if TYPE_CHECKING:
    from orchestrator.run import Run


def status(
    run: options.Directory,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw its course; needs the extra [plots].")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show how a run stands: while it goes on (in another process), after it, or after a crash."""
    from orchestrator.cli.conduct import report
    from orchestrator.cli.output import say
    from orchestrator.cli.plot import course, draw
    from orchestrator.run import Run

    with Run.open(run) as opened:
        summary = standing(opened)
        if plot is not None:
            draw(f"{opened.meta.environment}, run {opened.meta.run}", course(opened.episodes()), plot)
            summary["plot"] = str(plot)
    report(summary, run, json=json)
    if summary["state"] == "unfinished":
        say(f"no process works on it: `rollout resume {run}` goes on")


def standing(run: "Run") -> dict[str, Any]:
    """The object that `--json` prints: a finished run's own summary, else what the store says.

    `state` is `finished`, `running` (then `pid` owns it) or `unfinished`. What only a finished run knows (rates, CPU,
    memory) is None before.
    """
    out = str(run.directory.path)
    if run.summary is not None:
        return run.summary | {"out": out}
    owner, totals, plan = run.directory.live_owner(), run.totals(), run.plan
    return {
        "run": run.meta.run,
        "out": out,
        "state": "unfinished" if owner is None else "running",
        "environment": run.meta.environment,
        "episodes": totals.episodes,
        "planned": plan["groups"] * plan["size"] if plan else None,
        "outcomes": {outcome.value: count for outcome, count in totals.outcomes.items()},
        "reward_mean": totals.reward_mean,
        "reward_one": totals.reward_one,
        "steps": totals.steps,
        "wall_s": None,
        "episodes_per_s": None,
        "steps_per_s": None,
        "cpu_us_per_step_orchestrator": None,
        "cpu_us_per_step_sandbox": None,
        "peak_rss_mb": None,
        "model_calls": totals.model_calls,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "recovered_episodes": totals.recovered,
        "duplicates": totals.duplicates,
        "redelivered": totals.redelivered,
        "groups": totals.groups,
        "pid": owner,
    }

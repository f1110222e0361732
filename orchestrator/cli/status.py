"""`rollout status`: how a run stands, from its directory alone."""

import time
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
    from orchestrator.cli.output import emit_json, say
    from orchestrator.cli.plot import course, draw
    from orchestrator.cli.summary import print_summary
    from orchestrator.run import Run

    opened = Run.open(run)
    summary = standing(opened, run)
    if plot is not None:
        draw(f"{opened.meta.environment}, run {opened.meta.run}", course(opened.episodes()), plot)
        summary["plot"] = str(plot)
    if json:
        emit_json(summary)
    else:
        print_summary(summary)
    if summary["state"] == "unfinished":
        say(f"no process works on it: go on with `rollout resume {run}`")


def standing(run: "Run", out: Path) -> dict[str, Any]:
    """The object that `--json` prints. A finished run's own summary; else what the store says, unknown figures None."""
    from orchestrator.rundir import RunDirectory

    if run.summary is not None:
        return dict(run.summary)

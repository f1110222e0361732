"""`rollout show`: the episodes of a run, or one of them to read."""

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.run import Run


def show(
    run: options.Directory,
    episode: Annotated[
        str | None, typer.Argument(help="TASK/GROUP/SAMPLE, or a task: its first sample. Without it: a list.")
    ] = None,
    outcome: Annotated[str | None, typer.Option(help="List only episodes that ended so.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="List at most so many.")] = 50,
    full: Annotated[bool, typer.Option("--full", help="Do not cut long texts.")] = False,
) -> None:
    """Read a run in the terminal: a list of its episodes, or one episode's whole conversation."""
    from orchestrator.cli.conversation import conversation
    from orchestrator.cli.output import results
    from orchestrator.run import Run

    console = results()
    with Run.open(run) as opened:
        if episode is None:
            _list(console, opened, outcome, limit)
            return
        trajectory = opened.episode(episode)
        for line in conversation(trajectory, opened.transcript(trajectory), opened.toolsets(), full=full):
            console.print(line, soft_wrap=not console.is_terminal)


def _list(console: "Console", run: "Run", outcome: str | None, limit: int) -> None:
    """A table of the first episodes in the order in which they were stored, and how many there are."""
    from rich.table import Table
    from rich.text import Text

    from orchestrator.cli.output import counts, printable, say
    from orchestrator.names import unknown
    from orchestrator.types import Outcome

    if outcome is not None and outcome not in set(Outcome):
        raise unknown("outcome", outcome, Outcome)
    table = Table("episode", "outcome", "why", "reward", "steps", box=None, pad_edge=False, header_style="bold")
    wanted = (one for one in run.episodes() if outcome is None or one.outcome == outcome)
    for one in islice(wanted, limit):
        reward = "-" if one.reward is None else f"{one.reward:g}"
        why = one.stop_reason.value if one.failure is None else f"{one.failure.kind.value}"
        table.add_row(*map(Text, (printable(str(one.key)), one.outcome.value, why, reward, str(one.steps))))
    console.print(table)
    totals = run.totals()
    outcomes = counts({name.value: count for name, count in totals.outcomes.items()})
    say(f"{table.row_count:,} of {totals.episodes:,} episodes ({outcomes or 'none yet'}); more: --limit, --outcome")

"""The summary of a run as a table for people; the same figures as `--json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from orchestrator.cli.output import counts, duration, results

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print it on stdout."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows(summary):
        table.add_row(Text(what), Text(value))
    results().print(table)


def rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to show: name and value. A figure that is not known (None) is left out."""
    yield "run", f"{summary['run']} ({summary['state']})"
    planned = summary["planned"]
    of = f" of {planned:,}" if planned not in {None, summary["episodes"]} else ""
    yield "episodes", f"{summary['episodes']:,}{of}: {counts(summary['outcomes']) or 'none'}"
    if summary["reward_mean"] is not None:
        yield "reward", f"{summary['reward_mean']:.4f} mean, {summary['reward_one']:,} of exactly 1.0"
    yield "steps", f"{summary['steps']:,}"
    if summary["model_calls"]:
        tokens = f"{summary['prompt_tokens']:,} prompt and {summary['completion_tokens']:,} completion tokens"
        yield "model", f"{summary['model_calls']:,} calls, {tokens}"
    yield "recovered", f"{summary['recovered_episodes']:,} episodes"
    yield "delivery", f"{summary['duplicates']:,} duplicates, {summary['redelivered']:,} redelivered"
    if summary["wall_s"] is not None:
        yield from _life(summary)
    if left_out := summary.get("left_out"):
        yield "left out", f"{counts({name: one['count'] for name, one in left_out.items()})} (`rollout tasks` says why)"
    yield "data", str(summary["out"])
    if "plot" in summary:
        yield "plot", summary["plot"]


def _life(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of the last life alone; after a resume they are said to be."""
    done = f"{summary['life_episodes']:,} episodes and {summary['life_steps']:,} steps in {duration(summary['wall_s'])}"
    if summary["lives"] > 1:
        yield "since resume", f"{done}; the figures down to failures are of these alone"
    else:
        yield "time", done
    yield "speed", f"{summary['episodes_per_s']:,.1f} episodes/s, {summary['steps_per_s']:,.0f} steps/s"
    ours, theirs = summary["cpu_us_per_step_orchestrator"], summary["cpu_us_per_step_sandbox"]
    if ours is not None:
        sandboxes = "" if theirs is None else f", {theirs:,.1f} us sandboxes"
        yield "CPU a step", f"{ours:,.1f} us orchestrator{sandboxes}"
    yield "peak memory", f"{summary['peak_rss_mb']:,.0f} MB (orchestrator)"
    yield "failures", counts(summary["failures"]) or "none"

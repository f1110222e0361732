"""`rollout bench`: the benchmark's scenarios, each one JSON file, and a plot with the extra `[plots]`."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import options


def bench(
    scenario: Annotated[str, typer.Argument(help="overhead, density or recovery.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The JSON file. [default: bench-results/SCENARIO.json]")
    ] = None,
    kills: Annotated[int | None, typer.Option(min=1, help="recovery: how often the orchestrator is killed.")] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="How many episodes, where the scenario asks.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random choice.")] = 0,
    json: options.Json = False,
) -> None:
    """Measure this machine: what orchestration costs, what an episode weighs, what a kill loses."""

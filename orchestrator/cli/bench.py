"""`rollout bench`: the benchmark's scenarios, each one JSON file, and a plot with the extra `[plots]`.

`bench.registry` has the scenarios by name, and `conduct(name, sizes, out, say)`, which runs one, writes the file (and
the plot beside it) and gives its `Report`.
"""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import options


def bench(
    scenario: Annotated[
        str,
        typer.Argument(
            help="overhead, density, recovery, docker, docker-faults, webshop, appworld, agentscope or ray."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The JSON file (default bench-results/SCENARIO.json).")
    ] = None,
    kills: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="recovery: kills of the orchestrator; docker-faults: strikes of each fault."
        ),
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Episodes; fewer are quick and less exact.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides every random choice (default 0).")] = 0,
    json: options.Json = False,
) -> None:
    """Measure this machine: what orchestration, containers and clusters cost, what episodes weigh, what kills lose."""
    import asyncio

    from bench.registry import SCENARIOS, conduct
    from bench.values import Sizes
    from orchestrator.cli.output import emit_json, printable, results, say
    from orchestrator.names import unknown

    if scenario not in SCENARIOS:
        raise unknown("scenario", scenario, SCENARIOS)
    file = out or Path("bench-results") / f"{scenario}.json"
    report = asyncio.run(conduct(scenario, Sizes(seed=seed, episodes=episodes, kills=kills), file, say))
    say(f"written: {file}")
    if json:
        emit_json(report.result)
        return
    for name, value in report.result.items():
        results().print(f"{name}: {printable(str(value))}")

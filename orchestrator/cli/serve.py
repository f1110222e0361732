"""`rollout serve`: environments over HTTP, for clients of AgentScope Runtime's protocols and of our own wire."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_WHAT = "What is served"
_WHO = "Who may ask, and how much"


def serve(
    env: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="The environment; again for one more. The first is the default.", rich_help_panel=_WHAT
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="The port; 0 is any free one.")] = 8000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    backend: Annotated[
        Literal["local", "docker"], typer.Option(help="Where sandboxes run.", rich_help_panel=_WHAT)
    ] = "local",
    sandboxes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Sandboxes kept for each environment.", rich_help_panel=_WHAT)
    ] = 2,
    unsafe_local: Annotated[
        bool,
        typer.Option(
            "--unsafe-local",
            help="Let code of agents run on this machine, walled off by nothing.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    token_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIABLE",
            rich_help_panel=_WHO,
            help="A variable that holds a bearer token; again for one more (default: BEARER_TOKEN if set).",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without a token.", rich_help_panel=_WHO)
    ] = False,
    max_instances: Annotated[
        int, typer.Option(min=1, metavar="N", help="Live instances in all.", rich_help_panel=_WHO)
    ] = 4096,
    max_instances_per_token: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Live instances of one token.", rich_help_panel=_WHO)
    ] = None,
    idle: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=_WHO,
            help="Release an instance that no call has named for so long; 0: never.",
        ),
    ] = 300.0,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="What one step may take.")] = 60.0,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long instances go on after the first Ctrl-C.")
    ] = 30.0,
    logs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what sandboxes write to stderr here.", rich_help_panel=_WHAT),
    ] = None,
    no_install: Annotated[
        bool, typer.Option("--no-install", help="Do not install an environment that is missing.")
    ] = False,
) -> None:
    """Serve environments over HTTP, until Ctrl-C or SIGTERM: once drains, twice ends at once.

    Answers the routes of AgentScope Runtime's environment service and sandbox manager, and `GET /wire`, which
    `collect --backend remote` uses. The address is printed on stdout when it can be used; /openapi.json describes it.
    """
    import asyncio
    import logging

    from orchestrator.cli.serving import Serving, serve_until_told
    from orchestrator.service import ServiceLimits

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    serving = Serving(
        environments=tuple(dict.fromkeys(env)),
        backend=backend,
        unsafe=unsafe_local,
        install=not no_install,
        token_variables=tuple(token_env or ()),
        host=host,
        port=port,
        sandboxes=sandboxes,
        insecure=insecure,
        logs=logs,
        limits=ServiceLimits(
            instances=max_instances,
            instances_per_token=max_instances_per_token,
            idle_s=idle,
            step_s=timeout,
            drain_s=drain,
        ),
    )
    raise typer.Exit(asyncio.run(serve_until_told(serving)))

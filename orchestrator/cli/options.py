"""Options that several commands share, and those that were really given."""

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import typer

WHAT: Final = "What to collect"
WHO: Final = "Who acts"
HOW: Final = "How it runs"
OUTPUT: Final = "Output"

Directory: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.", rich_help_panel=OUTPUT)
]
Level: TypeAlias = Literal["debug", "info", "warning", "error"]
LogLevel: TypeAlias = Annotated[
    Level | None, typer.Option(help="What the log file holds (default info).", rich_help_panel=OUTPUT)
]
Verbose: TypeAlias = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the log on stderr too.", rich_help_panel=OUTPUT)
]
NoInstall: TypeAlias = Annotated[
    bool, typer.Option("--no-install", help="Do not install an environment that is missing.", rich_help_panel=HOW)
]
Concurrency: TypeAlias = Annotated[
    int | None, typer.Option(metavar="N", help="Episodes at once (default 256).", rich_help_panel=HOW)
]
Sandboxes: TypeAlias = Annotated[
    int | None, typer.Option(metavar="N", help="Sandboxes (default: by the number of cores).", rich_help_panel=HOW)
]
BaseUrl: TypeAlias = Annotated[
    str | None, typer.Option(metavar="URL", help="chat: the endpoint, up to and with /v1.", rich_help_panel=WHO)
]
Shards: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Orchestrators on a Ray cluster, each with local sandboxes on its node (0: here, as without).",
        rich_help_panel=HOW,
    ),
]
RayAddress: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="ray, shards: the cluster (default: RAY_ADDRESS, or one of our own).",
        rich_help_panel=HOW,
    ),
]
Listen: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="HOST[:PORT]", help="ray, shards: where the nodes reach this machine.", rich_help_panel=HOW),
]


def given(ctx: typer.Context) -> dict[str, object]:
    """The options that were given a value on the command line, by name."""
    return {name: value for name, value in ctx.params.items() if value is not None and value != ()}

"""`rollout env`: the environments, and installing them."""

from typing import Annotated

import typer

app = typer.Typer(help="List and install environments.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("list")
def list_() -> None:
    """The environments, with what they are and whether they are installed."""
    from rich.table import Table
    from rich.text import Text

    from backends.environments.catalog import find, names
    from orchestrator.cli.output import results

    table = Table("name", "installed", "licence", "description", box=None, pad_edge=False, header_style="bold")
    for spec in map(find, names()):
        installed = "yes" if spec.installed else "no"
        table.add_row(*map(Text, (spec.name, installed, spec.licence, spec.description)))
    results().print(table)


@app.command("install")
def install(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Environments, as `rollout env list` names them.")
    ],
) -> None:
    """Install environments, each into a venv of its own. Does nothing where it is done already."""
    import asyncio

    from backends.environments.catalog import find
    from backends.environments.install import install as install_environment
    from orchestrator.cli.output import say

    for spec in [find(name) for name in names]:
        asyncio.run(install_environment(spec, progress=say))

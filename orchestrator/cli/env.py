"""`rollout env`: the environments, installing them, and registering the data that they cannot bring."""

from pathlib import Path
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

    table = Table(
        "name", "installed", "source", "licence", "description", box=None, pad_edge=False, header_style="bold"
    )
    for spec in map(find, names()):
        installed = "yes" if spec.installed else "no"
        table.add_row(*map(Text, (spec.name, installed, spec.source, spec.licence, spec.description)))
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


@app.command("data")
def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An environment, as `rollout env list` names it.")],
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Copy the data from here and use it from now on.")
    ] = None,
) -> None:
    """Register an environment's data with --from, or download it where its package can; say what there is."""
    import asyncio

    from backends.environments.catalog import find, home
    from backends.environments.data import register
    from backends.environments.download import download
    from orchestrator.cli.output import results, say
    from orchestrator.errors import UsageError

    spec = find(name)
    if source is not None:
        try:
            register(spec, source.expanduser().absolute(), home() / "data", say)
        except OSError as error:
            raise UsageError(f"the data of {name!r} cannot be copied from {source}: {error}") from None
        return
    if spec.download and spec.data_folder is None:
        asyncio.run(download(spec, home() / "data", say))
    lines = [f"takes: {spec.data or 'no data; it brings all that it needs'}"]
    if spec.data:
        lines += [f"files: {', '.join(spec.data_files) or 'any'}", f"registered: {spec.data_folder or 'nothing yet'}"]
    for line in lines:
        results().print(line, soft_wrap=True, markup=False, highlight=False)


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and _.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to write it (default: ./NAME).", show_default=False)
    ] = None,
) -> None:
    """Begin an environment of your own: a small game in one file that works as it is, its declaration, its test."""
    from backends.environments.scaffold import scaffold
    from orchestrator.cli.output import results, say
    from orchestrator.errors import UsageError

    target = folder or Path(name)
    try:
        written = scaffold(name, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}; name another folder") from None
    for path in written:
        results().print(str(path), soft_wrap=True, markup=False, highlight=False)
    say(f"Next:  pip install -e {target}")
    say(f"       rollout collect --env {name} --policy replay --out runs/{name}")

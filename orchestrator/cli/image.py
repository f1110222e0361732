"""`rollout image`: the images that the Docker backend starts sandboxes from."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build the Docker backend's images.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The environment, as `rollout env list` names it.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="The image to build on: a Python of this one's version (default: pulled or made)."
        ),
    ] = None,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder with all wheels, pip's too (default: downloaded).",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    tag: Annotated[str | None, typer.Option(metavar="IMAGE", help="What to call it (default: by its content).")] = None,
) -> None:
    """Build an environment's image. `collect --backend docker` does it by itself when the image is missing."""
    import asyncio

    from backends.environments.catalog import find
    from backends.sandboxes.docker import images
    from backends.sandboxes.docker.port import Engine
    from orchestrator.cli.output import results
    from orchestrator.cli.steps import steps_shown

    async def work() -> str:
        async with await Engine.connect() as engine:
            with steps_shown(f"image of {name}") as progress:
                return await images.build(engine, find(name), progress, tag=tag, base=base, wheelhouse=wheelhouse)

    results().print(asyncio.run(work()))


@app.command("base")
def base() -> None:
    """Make a base image from this machine's Python, for a machine that reaches no registry."""
    import asyncio

    from backends.sandboxes.docker import images
    from backends.sandboxes.docker.port import Engine
    from orchestrator.cli.output import results
    from orchestrator.cli.steps import steps_shown

    async def work() -> str:
        async with await Engine.connect() as engine:
            with steps_shown("base image") as progress:
                return await images.build_base(engine, progress)

    results().print(asyncio.run(work()))

"""`rollout tasks`: the tasks of a split."""

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import options

if TYPE_CHECKING:
    from orchestrator.types import TaskList


def tasks(
    env: Annotated[str, typer.Option(help="The environment; see `rollout env list`.")],
    split: Annotated[str, typer.Option(help="NAME[:train|val]. [default: the environment's]")] = "",
    json: options.Json = False,
    no_install: options.NoInstall = False,
) -> None:
    """List a split's tasks in the data's order; what cannot run here is named on stderr."""
    import asyncio

    from orchestrator.cli.output import emit_json, printable, results, say

    found = asyncio.run(_ask(env, split, install=not no_install))
    for category, (count, needs) in found.left_out.items():
        say(f"left out: {category} ({count:,} tasks): it needs {needs}")
    if json:
        left_out = {name: {"count": count, "needs": needs} for name, (count, needs) in found.left_out.items()}
        emit_json({"environment": env, "split": split, "tasks": list(found.ids), "left_out": left_out})
        return
    console = results()
    console.print("\n".join(map(printable, found.ids)), soft_wrap=True)
    say(f"{len(found.ids):,} tasks")


async def _ask(env: str, split: str, *, install: bool) -> "TaskList":
    """Start one sandbox, ask it, end it."""
    from backends.environments.catalog import find
    from backends.sandboxes.local import START_S, LocalBackend
    from orchestrator.cli.build import ensure_installed
    from orchestrator.types import RunId

    await ensure_installed(find(env), install=install)
    backend = LocalBackend(env, auto_install=False)
    backend.configure(run=RunId("tasks"), with_solutions=False, logs=None, call_limit_s=START_S)
    async with backend:
        sandbox = await backend.create()
        return await sandbox.tasks(split)

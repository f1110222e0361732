"""`rollout reap`: remove what dead orchestrators left behind."""

from typing import Annotated

import typer

from orchestrator.cli import options


def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: options.Json = False,
) -> None:
    """Remove containers and private directories whose orchestrator is dead; nothing of a live one is touched.

    A run does this by itself when it begins, and its reaper when it dies; this is for what those could not remove.
    """
    import asyncio

    from backends.sandboxes.private import dead, sweep
    from orchestrator.cli.exits import FAILED
    from orchestrator.cli.output import emit_json, results

    directories = [str(path) for path in (dead() if dry_run else sweep())]
    looked = asyncio.run(_containers(dry_run=dry_run))
    found = looked or {"removed": [], "left": [], "unknown": []}
    verb = "would remove" if dry_run else "removed"
    if json:
        emit_json({"directories": directories, "looked_at_containers": looked is not None, **found})
    else:
        for name in (*directories, *found["removed"]):
            results().print(f"{verb} {name}")
        for name in found["left"]:
            results().print(f"cannot be removed: {name}")
        for name in found["unknown"]:
            results().print(f"left alone, for its owner cannot be seen from here: {name}")
    if found["left"]:
        raise typer.Exit(FAILED)


async def _containers(*, dry_run: bool) -> dict[str, list[str]] | None:
    """What was (or would be) removed, what will not go, and what belongs to nobody that can be judged from here; None
    where there is no daemon to ask."""
    from backends.sandboxes.docker.owners import Standing, clear_strays, owned
    from backends.sandboxes.docker.port import Engine
    from orchestrator.cli.output import say
    from orchestrator.errors import Unavailable

    try:
        engine = await Engine.connect()
    except Unavailable as error:
        say(f"no containers looked at: {error}")
        return None
    async with engine:
        containers = await owned(engine)
        dead = [one.names[0] for one, state in containers if state is Standing.DEAD]
        unknown = [one.names[0] for one, state in containers if state is Standing.UNKNOWN]
        removed = dead if dry_run else await clear_strays(engine)
    return {"removed": removed, "left": sorted(set(dead) - set(removed)), "unknown": unknown}

"""Fresh processes, each with one measurement as its only job.

A worker module calls `serve`; a scenario calls `work`. Always true: a worker ends with its caller's await, however that
ends; what it prints last is its row.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final

import orjson

from orchestrator.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from bench.values import Row

DEADLINE_S: Final = 1200.0
_TAIL: Final = 2000


def serve(measure: Callable[..., Awaitable[Row]]) -> None:
    """In the worker: measure with the arguments of the command line, print the row."""
    row = asyncio.run(_await(measure, orjson.loads(sys.argv[1])))
    sys.stdout.write(orjson.dumps(row).decode() + "\n")


async def _await(measure: Callable[..., Awaitable[Row]], arguments: dict[str, Any]) -> Row:
    return await measure(**arguments)


async def work(module: str, *, deadline_s: float = DEADLINE_S, **arguments: object) -> Row:
    """Run a worker module and return its row. Raises RunFailed with the end of its error output.

    Cancelled: the worker is killed, and its sandboxes die with it.
    """
    given = orjson.dumps(arguments).decode()
    # -P: a folder named like one of our packages in the working directory must not take its place.
    command = (sys.executable, "-P", "-m", module, given)
    return await row_of(command, f"{module} ({given})", deadline_s=deadline_s)


async def row_of(
    command: Sequence[str],
    what: str,
    *,
    deadline_s: float = DEADLINE_S,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Row:
    """Run a program whose last line of output is a row. `what` names it in RunFailed. Cancelled: it is killed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate()
    except TimeoutError:
        raise RunFailed(f"{what} did not end within {deadline_s:g} s; use smaller sizes") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip()[-_TAIL:]
        raise RunFailed(f"{what} ended with status {process.returncode}:\n{said}")
    row: Row = orjson.loads(output.splitlines()[-1])
    return row

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
    from collections.abc import Awaitable, Callable

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
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # a folder named like one of our packages in the working directory must not take its place
        "-m",
        module,
        orjson.dumps(arguments).decode(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate()
    except TimeoutError:
        raise RunFailed(f"{module} did not end within {deadline_s:g} s ({arguments}); use smaller sizes") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip()[-_TAIL:]
        raise RunFailed(f"{module} ended with status {process.returncode} ({arguments}):\n{said}")
    row: Row = orjson.loads(output.splitlines()[-1])
    return row

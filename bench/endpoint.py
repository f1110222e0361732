"""A fake model endpoint in a process of its own, so that it outlives a killed client.

`endpoint_process` starts and ends it; `python -m bench.endpoint` is the same from a shell, and prints the URL as its
first line. `Endpoint` (in `bench.endpoint_server`) is the server itself.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import resource
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from bench.endpoint_server import Endpoint, EndpointOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_START_S: Final = 15.0
_STOP_S: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1


class EndpointProcess(NamedTuple):
    """An endpoint in a process of its own."""

    url: str
    pid: int


@asynccontextmanager
async def endpoint_process(options: EndpointOptions, *, die_with_parent: bool = True) -> AsyncIterator[EndpointProcess]:
    """Start the endpoint in a process of its own and end it on leaving. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "bench.endpoint", *options.arguments()]
    if die_with_parent:
        command.append("--die-with-parent")
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S):
            url = (await process.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError("the fake endpoint ended before it listened; its error output says why")
        yield EndpointProcess(url, process.pid)
    finally:
        await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def _serve(options: EndpointOptions) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Endpoint(options) as endpoint:
        sys.stdout.write(f"{endpoint.url}\n")
        sys.stdout.flush()
        await stop.wait()


def _die_with_parent() -> None:
    parent = os.getppid()
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
        raise SystemExit("the parent is already gone")


def _options(arguments: list[str]) -> tuple[EndpointOptions, bool]:
    parser = argparse.ArgumentParser(prog="python -m bench.endpoint", description="A fake model endpoint on loopback.")
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1 (0: any)")
    parser.add_argument("--socket", type=Path, help="a unix socket instead of a port")
    parser.add_argument("--answers", type=Path, help="recorded answers, as bench.answers.write_answers writes them")
    parser.add_argument("--log", type=Path, help="append one line an answered call here")
    parser.add_argument("--latency", type=float, default=0.0, dest="latency_s", help="seconds before an answer")
    parser.add_argument("--jitter", type=float, default=0.0, dest="jitter_s", help="seconds by which latency varies")
    parser.add_argument("--fail-rate", type=float, default=0.0, help="share of calls answered with 500 and 429")
    parser.add_argument("--hang-rate", type=float, default=0.0, help="share of calls never answered")
    parser.add_argument("--malformed-rate", type=float, default=0.0, help="share of calls answered with nonsense")
    parser.add_argument("--retry-after", type=float, default=1.0, dest="retry_after_s", help="seconds, with each 429")
    parser.add_argument("--seed", type=int, default=0, help="seed of faults and jitter")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the parent process ends (Linux)")
    given = vars(parser.parse_args(arguments))
    die_with_parent = given.pop("die_with_parent")
    return EndpointOptions(**given), die_with_parent


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    options, die_with_parent = _options(sys.argv[1:])
    if die_with_parent:
        _die_with_parent()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_serve(options))


if __name__ == "__main__":
    main()

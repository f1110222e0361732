"""Runs a service from the command line: gets its environments ready, says where it listens, obeys signals.

The first SIGINT or SIGTERM drains, the second ends at once; while it is being made ready the first one ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from backends.environments.catalog import find
from orchestrator.cli.build import ensure_image, ensure_installed
from orchestrator.cli.exits import CANCELLED, OK
from orchestrator.cli.output import results, say
from orchestrator.errors import UsageError
from orchestrator.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from backends.environments.catalog import EnvironmentSpec
    from orchestrator.protocols import Backend
    from orchestrator.service import ServiceLimits

TOKEN_VARIABLE: Final = "BEARER_TOKEN"
"""Where the original's manager has its token."""
_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Serving:
    """What the command was asked for."""

    environments: tuple[str, ...]
    backend: Literal["local", "docker"]
    unsafe: bool
    install: bool
    token_variables: tuple[str, ...]
    host: str
    port: int
    sandboxes: int
    insecure: bool
    logs: Path | None
    limits: ServiceLimits


async def serve_until_told(serving: Serving) -> int:
    """Serve; the exit code. Raises RolloutError where it cannot be made ready."""
    signals = _Signals()
    with signals.obeyed():
        try:
            await _serve(serving, signals)
        except asyncio.CancelledError:
            if signals.ready:
                raise
            say("ended before it was ready")
            return CANCELLED
    signals.ignored()
    return OK


async def _serve(serving: Serving, signals: _Signals) -> None:
    backends: dict[str, Callable[[], Backend]] = {}
    for name in serving.environments:
        spec = find(name)
        await _ensure(spec, serving)
        backends[spec.name] = partial(_backend, spec, serving)
    async with Service(
        backends,
        host=serving.host,
        port=serving.port,
        sandboxes=serving.sandboxes,
        tokens=_tokens(serving.token_variables),
        limits=serving.limits,
        insecure=serving.insecure,
        logs=await _folder(serving.logs),
    ) as service:
        signals.ready = True
        results().print(service.url)
        say(f"serving {', '.join(backends)}; Ctrl-C drains, twice ends at once")
        await signals.next()
        say(f"draining: {service.health()['instances']} instances may go on for {serving.limits.drain_s:g} s")
        await _drained(service, signals)
    say("ended")


async def _drained(service: Service, signals: _Signals) -> None:
    """Until no instance is left, the time is over, or another signal has come."""
    tasks = {asyncio.create_task(service.drain()), asyncio.create_task(signals.next())}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _folder(logs: Path | None) -> str | None:
    """The folder of logs, made where it is missing. Raises UsageError."""
    if logs is None:
        return None
    try:
        await asyncio.to_thread(logs.mkdir, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--logs {logs}: {error.strerror}") from None
    return str(logs)


async def _ensure(spec: EnvironmentSpec, serving: Serving) -> None:
    if serving.backend == "docker":
        await ensure_image(spec, None, build=serving.install)
    else:
        await ensure_installed(spec, install=serving.install)


def _backend(spec: EnvironmentSpec, serving: Serving) -> Backend:
    if serving.backend == "docker":
        from backends.sandboxes.docker import DockerBackend  # its client is heavy, and needed here alone

        return DockerBackend(spec.name)
    from backends.sandboxes.local import LocalBackend

    return LocalBackend(spec.name, unsafe=serving.unsafe, auto_install=False)


def _tokens(variables: tuple[str, ...]) -> dict[str, str]:
    """The tokens by the names of their variables. Raises UsageError where one is not set."""
    if not variables:
        return {TOKEN_VARIABLE: os.environ[TOKEN_VARIABLE]} if os.environ.get(TOKEN_VARIABLE) else {}
    if missing := [name for name in variables if not os.environ.get(name)]:
        raise UsageError(f"the variable {missing[0]} holds no token: set it, or leave --token-env out")
    return {name: os.environ[name] for name in variables}


class _Signals:
    """SIGINT and SIGTERM: until `ready` the first one cancels whoever waits here, afterwards each is counted."""

    def __init__(self) -> None:
        self.ready = False
        self._come: asyncio.Queue[None] = asyncio.Queue()
        self._main = asyncio.current_task()

    async def next(self) -> None:
        """Wait for one more."""
        await self._come.get()

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Obey them in here."""
        loop = asyncio.get_running_loop()
        for number in _NUMBERS:
            loop.add_signal_handler(number, self._obey)
        try:
            yield
        finally:
            for number in _NUMBERS:
                loop.remove_signal_handler(number)

    def ignored(self) -> None:
        """Everything has ended: one more must not make a failure of the process's last moments."""
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def _obey(self) -> None:
        if self.ready:
            self._come.put_nowait(None)
        elif self._main is not None:
            self._main.cancel()

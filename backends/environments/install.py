"""Installs an environment: a venv of its own, complete as soon as it is visible.

The venv is built under a temporary name beside its place and renamed when everything is in; a lock file keeps two
installers apart, and what a dead one left is removed by the next. pip's output goes to a log file next to the venv.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import shutil
import sys
from typing import IO, TYPE_CHECKING, Final

from backends.environments.commands import last_lines, run, secluded, users
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from backends.environments.catalog import EnvironmentSpec

DEADLINE_S: Final = 900.0
_LOCK_POLL_S: Final = 0.2
_AWAY: Final = ".home"
"""Where a package's own set-up writes what it would put into the user's home; removed with it."""


async def install(spec: EnvironmentSpec, *, progress: Callable[[str], None], deadline_s: float = DEADLINE_S) -> Path:
    """Make `spec` ready and return its interpreter. Idempotent; waits for another installer of the same venv.

    `progress` gets a line for people at each stage. Raises Unavailable with the end of pip's output and what to do
    about it. Cancelled: pip is killed and the unfinished venv removed.
    """
    venv = spec.venv
    if venv is None:
        progress(f"{spec.name}: needs no packages of its own")
        return spec.interpreter()
    log = venv.with_name(f"{venv.name}.log")
    try:
        async with asyncio.timeout(deadline_s):
            await asyncio.to_thread(venv.parent.mkdir, parents=True, exist_ok=True)
            async with _locked(venv.with_name(f".{venv.name}.lock"), spec.name, progress) as lock:
                if not spec.installed:
                    await _build(spec, venv, log, lock, progress)
    except TimeoutError:
        raise await _failed(spec, f"it took more than {deadline_s:.0f} s", log) from None
    except OSError as error:
        raise await _failed(spec, str(error), log) from None
    progress(f"{spec.name}: installed in {venv}")
    return spec.interpreter()


@contextlib.asynccontextmanager
async def _locked(path: Path, name: str, progress: Callable[[str], None]) -> AsyncIterator[int]:
    """Hold the installer's lock, a file descriptor; the kernel frees it when its last holder dies."""
    with await asyncio.to_thread(path.open, "ab") as lock:
        waiting = False
        while not _try_lock(lock):
            if not waiting:
                progress(f"{name}: waiting for another installation of it")
                waiting = True
            await asyncio.sleep(_LOCK_POLL_S)
        yield lock.fileno()


def _try_lock(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _build(spec: EnvironmentSpec, venv: Path, log: Path, lock: int, progress: Callable[[str], None]) -> None:
    building = venv.with_name(f".building-{venv.name}")
    await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)
    python = building / "bin" / "python"
    hosts_pip = importlib.util.find_spec("pip") is not None
    make = [sys.executable, "-m", "venv", *(["--without-pip"] if hosts_pip else []), str(building)]
    # the host's pip can fill another venv: that saves the seconds that a pip of its own would take
    pip = [sys.executable, "-P", "-m", "pip", "--python", str(python)] if hosts_pip else [str(python), "-m", "pip"]
    away = building / _AWAY
    stages: list[tuple[str, list[str], dict[str, str]]] = [("making a venv", make, users())]
    for packages, flags in ((spec.requirements, []), (spec.requirements_no_deps, ["--no-deps"])):
        if packages:
            stages.append((f"installing {', '.join(packages)}", [*pip, "install", *flags, *packages], users()))
    if spec.setup:
        stages.append(("setting up", [str(python), "-I", *spec.setup], secluded(away)))
    try:
        with await asyncio.to_thread(log.open, "wb") as output:
            for stage, command, variables in stages:
                progress(f"{spec.name}: {stage}")
                # it holds the lock too: where the installer is killed, the next one waits until this has ended
                status = await run(command, output, variables, holds=(lock,))
                if status != 0:
                    raise await _failed(spec, f"{stage} ended with status {status}", log)
        await asyncio.to_thread(shutil.rmtree, away, ignore_errors=True)
        await asyncio.to_thread(building.rename, venv)
    finally:
        await asyncio.to_thread(shutil.rmtree, building, ignore_errors=True)


async def _failed(spec: EnvironmentSpec, why: str, log: Path) -> Unavailable:
    tail = await asyncio.to_thread(last_lines, log)
    return Unavailable(
        f"environment {spec.name!r} could not be installed: {why}. Check the network, the package index and the disk "
        f"space, then run `rollout env install {spec.name}` again; the whole log is {log}{tail}"
    )

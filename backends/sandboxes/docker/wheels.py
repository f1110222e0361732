"""The wheels of an environment's image: downloaded by the host's pip into a folder that later builds find again.

Always true: a folder under its final name is complete; one that was begun and not finished is removed, at the latest by
the next download.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from backends.environments.catalog import home
from backends.sandboxes.docker.port import Step
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Progress

SERVER: Final = ("aiohttp>=3.14,<4", "orjson>=3.11")
"""What the server inside imports."""
DOWNLOAD_S: Final = 900.0
_ABANDONED_S: Final = 4 * DOWNLOAD_S
_TAIL: Final = 8


def requirements_of(spec: EnvironmentSpec) -> tuple[list[str], list[str]]:
    """What an image installs, and what of it without its own dependencies."""
    return sorted({*SERVER, *spec.requirements}), list(spec.requirements_no_deps)


async def download(spec: EnvironmentSpec, progress: Progress) -> Path:
    """A folder with the wheels of an environment: an earlier one, or a new one. Raises Unavailable."""
    requirements, alone = requirements_of(spec)
    key = blake2b(orjson.dumps([sys.version_info[:2], requirements, alone]), digest_size=8).hexdigest()
    wheels = home() / "wheels" / f"{spec.name}-{key}"
    if await asyncio.to_thread(wheels.is_dir):
        return wheels
    partial = await asyncio.to_thread(_begin, wheels)
    try:
        progress(Step(f"{spec.name}: downloading {', '.join((*requirements, *alone))}"))
        for flags, names in (([], [*requirements, "pip"]), (["--no-deps"], alone)):
            if names:
                await _pip(["download", "--only-binary=:all:", "-d", str(partial), *flags, *names])
        await asyncio.to_thread(_publish, partial, wheels)
    finally:
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
    return wheels


def check(folder: Path, spec: EnvironmentSpec) -> None:
    """Whether a folder of the user's can be built from at all. Raises Unavailable."""
    if not any(folder.glob("pip-*.whl")):
        requirements, alone = requirements_of(spec)
        lists = (["pip", *requirements], ["--no-deps", *alone] if alone else [])
        how = " and ".join(
            f"`{sys.executable} -m pip download -d {folder} {shlex.join(words)}`" for words in lists if words
        )
        raise Unavailable(f"{folder} has no wheel of pip, which installs the others: fill it with {how}")


def _begin(wheels: Path) -> Path:
    """A folder to download into; what killed downloads have left goes."""
    wheels.parent.mkdir(parents=True, exist_ok=True)
    for left in wheels.parent.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f".{wheels.name}-", dir=wheels.parent))


async def _pip(arguments: Sequence[str]) -> None:
    """Run the host's pip; cancelled: it is killed. Raises Unavailable with the end of what it said."""
    if find_spec("pip") is None:
        raise Unavailable(
            f"{sys.executable} has no pip to download with: give a folder of wheels with --wheelhouse DIR"
        )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DOWNLOAD_S):
            output, _ = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"pip download did not end within {DOWNLOAD_S:g} s: check the network") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        tail = "".join(f"\n    {line}" for line in output.decode(errors="replace").splitlines()[-_TAIL:])
        raise Unavailable(
            f"pip download failed: check the network and the package index, or give a folder of wheels with "
            f"--wheelhouse DIR{tail}"
        )


def _publish(partial: Path, wheels: Path) -> None:
    try:
        partial.rename(wheels)
    except OSError:
        if not wheels.is_dir():  # not another caller's identical folder
            raise

"""Commands that an installation or a download is made of: output into a file, killed with all they started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_REACHING: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_KEPT: Final = ("PATH", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")


def users() -> dict[str, str]:
    """The user's own variables, but for Python's: for pip, which has its configuration there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def secluded(home: Path) -> dict[str, str]:
    """What a package's own command needs: a way to the network, and `home` to write to instead of the user's.

    No variable of the user's decides where it writes, and no `.env` file (python-dotenv looks for one).
    """
    named = (*_KEPT, *_REACHING, *map(str.lower, _REACHING))
    kept = {name: os.environ[name] for name in named if name in os.environ}
    return kept | {"HOME": str(home), "PYTHON_DOTENV_DISABLED": "1"}


async def run(
    command: Sequence[str],
    output: IO[bytes],
    variables: Mapping[str, str],
    *,
    folder: Path | None = None,
    holds: Sequence[int] = (),
) -> int:
    """Run a command in `folder` with its output in a file; its exit status. Cancelled: its process group is killed.

    `holds` are descriptors that it keeps open, such as a lock that is to last until it has ended. Raises OSError.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        env=variables,
        cwd=folder,
        start_new_session=True,
        pass_fds=holds,
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def last_lines(log: Path, count: int = 8) -> str:
    """The end of a command's output, each line indented behind a line break; empty where there is none."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "".join(f"\n    {line}" for line in lines)

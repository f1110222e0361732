"""A backend's private directory: its socket and its sandboxes' temporary files, and the sweep of dead ones.

Lies in `$XDG_RUNTIME_DIR` or the system's temporary directory, never below a run directory (a unix socket's path is
limited to 108 bytes). Always true: it is 0700 and names its owner; making one removes those of this user whose owner
is dead, so that what a kill -9 leaves behind goes with the next start.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from backends.server.folders import remove_all
from orchestrator.rundir import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX: Final = "rollout-backend-"
_OWNER: Final = "owner"
_UNNAMED_S: Final = 60.0
"""A directory without an owner's name is being made; after this many seconds it is a dead one's."""


@contextmanager
def private_directory() -> Iterator[Path]:
    """A fresh directory of this process's own, removed with all that is in it. Blocks on the disk."""
    parent = _parent()
    sweep(parent)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        (path / _OWNER).write_bytes(orjson.dumps(Owner.current()))
        yield path
    finally:
        remove_all([path])


def sweep(parent: Path | None = None) -> list[Path]:
    """Remove this user's directories whose owner is dead; which."""
    found = dead(parent)
    remove_all(found)
    return found


def dead(parent: Path | None = None) -> list[Path]:
    """This user's directories whose owner is dead."""
    return [path for path in (parent or _parent()).glob(f"{PREFIX}*") if _dead(path)]


def _dead(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False  # its owner has just removed it
    try:
        if status.st_uid != os.getuid() or not path.is_dir():
            return False
        return not Owner(**orjson.loads((path / _OWNER).read_bytes())).alive()
    except (FileNotFoundError, orjson.JSONDecodeError, TypeError):
        return time.time() - status.st_mtime > _UNNAMED_S


def _parent() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())

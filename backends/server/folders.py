"""The folders of sessions: one each, for all that its process may write, removed when that has ended.

Owned by the zygote; they lie in `sessions` in the server's temporary folder. Always true: a folder is a session's alone
and empty when the session gets it, as its name (the lowest free number, so that a sandbox of one session at a time
gives the same to each) is free again only when the folder is gone. Removing takes as long as a session wishes, so it is
done by a process of its own, and only when nothing that might write there is left.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_ALL: Final = stat.S_IRWXU


class Folders:
    """Make it once, before the first session."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._base = Path(tempfile.gettempdir()).resolve() / "sessions"
        self._base.mkdir(mode=_ALL, exist_ok=True)
        if self._base.is_symlink() or self._base.stat().st_uid != os.getuid():
            raise PermissionError(f"{self._base} is somebody else's: give the server a TMPDIR of its own")
        self._taken: dict[int, Path] = {}
        """pid -> folder of a session that lives."""
        self._left: list[Path] = []
        """Of sessions that have ended, not removed yet."""

    def make(self) -> Path:
        """A fresh folder. Raises OSError, as where the disk is full."""
        for number in count(1):
            folder = self._base / str(number)
            try:
                folder.mkdir(mode=_ALL)
            except FileExistsError:
                continue
            return folder
        raise AssertionError

    def give(self, folder: Path, pid: int) -> None:
        """It is the folder of the session in this process."""
        self._taken[pid] = folder

    def drop(self, pid: int) -> None:
        """A process has ended; if it was a session's, its folder is to be removed."""
        if (folder := self._taken.pop(pid, None)) is not None and not _removed(folder):
            self._left.append(folder)

    def left(self) -> list[Path]:
        """Take over those that are to be removed, by `remove_all`."""
        left, self._left = self._left, []
        return left

    def keep(self, folders: list[Path]) -> None:
        """Take back what `left` has given."""
        self._left += folders


def settle(folder: Path) -> None:
    """Make it this process's own: where it is, where it is at home, and where its temporary files go."""
    os.chdir(folder)
    os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def remove_all(folders: Iterable[Path]) -> None:
    """Remove what can be removed; a folder that stays keeps its name to itself."""
    for folder in folders:
        with contextlib.suppress(OSError):
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, however deep it lies and whatever its owner has closed to itself.

    Folders below are moved up beside `folder` before they are entered: no path gets longer, and no stack. Gone already
    is success. Raises OSError where somebody still writes there, or may not write.
    """
    number, places = 0, [folder]
    while places:
        try:
            places[-1].chmod(_ALL)
            with os.scandir(places[-1]) as entries:
                found = list(entries)
        except FileNotFoundError:
            places.pop()
            continue
        place = places.pop()
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                number += 1
                moved = folder.with_name(f".{folder.name}-{number}")
                os.chmod(entry.path, _ALL)  # a closed folder cannot be moved
                os.rename(entry.path, moved)
                places.append(moved)
            else:
                os.unlink(entry.path)
        place.rmdir()


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True

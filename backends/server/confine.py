"""Holds a process and all that it starts, for good, by Landlock (Linux 5.13 and later): what it may read and change.

Landlock grants by place: a right that is handled at all is denied wherever no rule grants it. So a `Confinement` grants
everything outside the secrets, place by place, and nothing for the folders above a secret, where a grant would reach
down to it. Its rules are made once and put in force by each process that is to be held. `hold` then leaves that process
one folder to write below: what others read (the environment's code and data, the folders of graders and of siblings)
stays as it was. Besides, a held process can neither trace nor read the memory of one outside (a sibling is outside),
and from ABI 6 on send it no signal. Emptying a file in place is held from ABI 3 on; modes and times of files never are.

Source of the numbers: linux/landlock.h and https://docs.kernel.org/userspace-api/landlock.html.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_ENTRIES: Final = sum(1 << bit for bit in range(4, 13))
"""Removing and making directory entries of every kind."""
_REFER: Final = 1 << 13
"""Renaming and linking between folders, since ABI 2; before, all of it is denied."""
_TRUNCATE: Final = 1 << 14
"""Since ABI 3."""
_SCOPE_SIGNAL: Final = 1 << 1
"""Since ABI 6."""
_FILE_RIGHTS: Final = _WRITE_FILE | _READ_FILE | _TRUNCATE
"""Those that a rule about anything but a folder may grant."""
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm")
"""What any program writes to in /dev; semaphores between processes are files in `shm`."""


class _Rules(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """The ABI of this kernel's Landlock; 0 where there is none, or a filter of system calls forbids it."""
    if sys.platform != "linux":
        return 0
    return max(_syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)), 0)


def outside(secrets: Iterable[Path]) -> Iterator[Path]:
    """The highest places, no links, that together hold every file of this machine but those at or below `secrets`.

    `secrets` are resolved paths. What lies beside a folder that leads to one is a place of its own.
    """
    closed = set(secrets)
    above = {parent for secret in closed for parent in secret.parents}
    folders = [Path("/")] if above else []
    while folders:
        for entry in _entries(folders.pop()):
            path = Path(entry.path)
            if path in closed or entry.is_symlink():
                continue
            if path in above:
                folders.append(path)
            else:
                yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []  # who may not list it here may not do so later


class Confinement:
    """Rules that close `secrets`, ready to be put in force. Holds a file descriptor, `fd`, until `close`.

    They exist, and there is one at least. Raises OSError where the kernel refuses them. Make it only where `version()`
    is not 0.
    """

    def __init__(self, secrets: Iterable[Path]) -> None:
        rights = _READ_FILE | _changing(version())
        self.fd = _ruleset(rights, outside([path.resolve() for path in secrets]))

    def enforce(self) -> None:
        """Hold this process and all that it will start, from now on and for ever."""
        _enforce(self.fd)

    def close(self) -> None:
        """Give the rules back; what is in force stays so."""
        os.close(self.fd)


def hold(folder: Path) -> None:
    """Let this process and all that it will start change no file but those below `folder`, and signal no other process.

    Raises OSError. Only where `version()` is not 0.
    """
    abi = version()
    rights = _changing(abi)
    devices = [path for path in (Path("/dev", name) for name in _DEVICES) if not path.is_symlink()]
    fd = _ruleset(rights, [folder, *devices], scoped=_SCOPE_SIGNAL if abi >= 6 else 0)
    try:
        _enforce(fd)
    finally:
        os.close(fd)


def _changing(abi: int) -> int:
    """The rights to change files and folders that this kernel knows."""
    return _WRITE_FILE | _ENTRIES | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)


def _ruleset(rights: int, places: Iterable[Path], *, scoped: int = 0) -> int:
    """A file descriptor of rules that deny `rights` but at and below `places`. Raises OSError."""
    abi = version()
    rules = _Rules(rights, 0, scoped)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    fd = _checked(_syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0)))
    try:
        for place in places:
            _grant(fd, place, rights)
    except OSError:
        os.close(fd)
        raise
    return fd


def _grant(ruleset: int, place: Path, rights: int) -> None:
    try:
        fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # gone meanwhile, or closed to this user anyway
    try:
        folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        rule = _Beneath(rights if folder else rights & _FILE_RIGHTS, fd)
        kind = ctypes.c_int(_RULE_PATH_BENEATH)
        _checked(_syscall(_ADD_RULE, ctypes.c_int(ruleset), kind, ctypes.byref(rule), ctypes.c_uint32(0)))
    finally:
        os.close(fd)


def _enforce(ruleset: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)))


def _syscall(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result

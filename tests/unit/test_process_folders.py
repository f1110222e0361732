"""Folders of sessions: whose they are, and that nothing in one keeps it from being removed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from backends.server.folders import Folders, remove, remove_all

if TYPE_CHECKING:
    from pathlib import Path

DEEP = 3000
"""Deeper than a path may be long, and than Python's stack."""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "sessions"


def dig(folder: Path) -> None:
    """A chain of folders, each in the one before."""
    folder.mkdir()
    at = os.open(folder, os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)


def test_a_name_is_free_again_when_the_folder_is_gone(base: Path) -> None:
    folders = Folders()
    first, second = folders.make(), folders.make()
    assert [first.name, second.name] == ["1", "2"]
    assert first.parent == base
    folders.give(first, 10)
    folders.give(second, 20)
    (first / "file").touch()
    folders.drop(10)
    folders.drop(20)
    folders.drop(30)
    assert not second.exists(), "an empty one goes at once"
    assert folders.make() == second
    left = folders.left()
    assert left == [first]
    assert folders.left() == []
    folders.keep(left)
    assert folders.left() == [first]
    remove_all(left)
    assert folders.make() == first


def test_somebody_else_s_folder_is_not_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    base.symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="give the server a TMPDIR"):
        Folders()


def test_what_is_deep_is_removed(tmp_path: Path) -> None:
    dig(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    remove(tmp_path / "folder")


def test_what_is_closed_is_removed_and_nothing_beyond_a_link(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    for path in (kept / "in", folder / "a" / "b" / "c", folder / "d"):
        path.mkdir(parents=True)
    (folder / "a" / "b" / "file").touch()
    (folder / "d" / "to").symlink_to(kept)
    (folder / "dangling").symlink_to("nowhere")
    for path in (folder / "a" / "b", folder / "a", folder / "d", folder):
        path.chmod(0)
    kept.chmod(0o555)
    remove(folder)
    assert list(tmp_path.iterdir()) == [kept]
    assert (kept.stat().st_mode & 0o777, [path.name for path in kept.iterdir()]) == (0o555, ["in"])


def test_what_cannot_be_removed_stays(tmp_path: Path) -> None:
    stuck, other = tmp_path / "stuck", tmp_path / "other"
    stuck.touch()
    other.mkdir()
    remove_all([stuck, other])
    assert list(tmp_path.iterdir()) == [stuck]
    with pytest.raises(NotADirectoryError):
        remove(stuck)

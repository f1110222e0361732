"""Data of environments that cannot be shipped: files of the user's, registered once and found by every sandbox.

What is registered lies in `home()/data/NAME`, a link to a folder that carries its content's digest in its name: a new
registration swaps the link, and a run that goes on keeps the folder that it began with. The digest is part of the
environment's own, so a trajectory made from other data is never replayed or graded on these. A server finds the folder
in the variable `ROLLOUT_DATA`, read-only inside a container.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from backends.environments.catalog import EnvironmentSpec

VARIABLE: Final = "ROLLOUT_DATA"
_PIECE: Final = 1 << 20


def registered(base: Path, name: str) -> Path | None:
    """The folder of data registered for the environment `name`, without links; None where there is none."""
    link = base / name
    return link.resolve() if link.is_dir() else None


def digest_of(folder: Path | None) -> str:
    """16 hex digits over a registered folder's content, as its registration found them; empty without one."""
    return "" if folder is None else folder.name.rpartition("-")[2]


def register(spec: EnvironmentSpec, source: Path, base: Path, progress: Callable[[str], None]) -> Path:
    """Copy `source` (a folder, or one file of an environment that needs one) and make it the environment's data.

    Copies what the declared `data_files` fit, or every file where none are declared; complete as soon as it is
    visible. Raises UsageError for an environment that takes no data, and names the files that are missing; OSError.
    """
    if not spec.data:
        raise UsageError(f"environment {spec.name!r} takes no data: it brings all that it needs")
    files = _wanted(spec, source)
    base.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=base))
    try:
        total = sum(path.stat().st_size for path in files.values())
        progress(f"{spec.name}: copying {len(files)} files, {total / 2**20:,.1f} MiB")
        digest = _copy(files, building)
        target = base / f"{spec.name}-{digest}"
        building.chmod(0o755)
        if not target.is_dir():
            building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _point(base / spec.name, target)
    progress(f"{spec.name}: registered in {target}")
    return target


def _wanted(spec: EnvironmentSpec, source: Path) -> dict[str, Path]:
    """Name below the data folder -> the file to copy."""
    if source.is_file() and spec.data_files == (source.name,):
        return {source.name: source}
    if not source.is_dir():
        raise UsageError(f"{source} is no folder; {spec.name} needs {_needs(spec.data_files)}: {spec.data}")
    if spec.data_files:
        matches = {pattern: _matching(source, pattern) for pattern in spec.data_files}
        if missing := [pattern for pattern, found in matches.items() if not found]:
            raise UsageError(f"{source} lacks {', '.join(missing)}; {spec.name} needs: {spec.data}")
        return dict(sorted((name, path) for found in matches.values() for name, path in found.items()))
    found = _matching(source, "**")
    if not found:
        raise UsageError(f"{source} is empty; {spec.name} needs: {spec.data}")
    return dict(sorted(found.items()))


def _matching(source: Path, pattern: str) -> dict[str, Path]:
    """The files below `source` that a pattern fits; `**` at its end is all that lies below."""
    paths = source.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
    return {path.relative_to(source).as_posix(): path for path in paths if path.is_file()}


def _needs(names: Sequence[str]) -> str:
    return f"one that holds {', '.join(names)}" if names else "one"


def _copy(files: dict[str, Path], target: Path) -> str:
    digest = blake2b(digest_size=8)
    for name, path in files.items():
        raw = os.fsencode(name)
        digest.update(len(raw).to_bytes(8, "little") + raw)
        output = target / name
        output.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with path.open("rb") as reading, output.open("xb") as writing:
            while piece := reading.read(_PIECE):
                digest.update(piece)
                size += writing.write(piece)
        digest.update(size.to_bytes(8, "little"))
        output.chmod(0o644)
        for folder in output.relative_to(target).parents:
            (target / folder).chmod(0o755)  # a sandbox may run as nobody
    return digest.hexdigest()


def _point(link: Path, target: Path) -> None:
    """Swap the link in one step."""
    fresh = link.with_name(f".{link.name}-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    fresh.replace(link)

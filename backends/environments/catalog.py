"""The catalogue: which environments there are, what each needs, and where its files and its interpreter lie.

An environment is a folder with an `environment.toml` beside its `inside.py`: `backends/environments/NAME`, or a package
of somebody else's that is named by an entry point of the group `rollout.environments`. Its digest is the content of
every file that runs inside its sandboxes (its folder and `backends/server`), its requirements and its registered data:
two runs with the same digest, seed and actions see the same bytes. Nothing here imports an environment's code.

What is built from it lies under `home()`: `envs/` (a venv for each set of requirements), `stage/` (the staged sources
by digest, complete as soon as they are visible) and `data/`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

from backends.environments.data import digest_of, registered
from backends.environments.discovery import BUILT_IN, DECLARATION, FOLDER, places
from orchestrator.errors import Unavailable, UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

ISOLATIONS: Final = ("shared", "process")

_BACKENDS = FOLDER.parent
_TEXTS = {"name": str, "description": str, "licence": str, "isolation": str, "deterministic": bool, "runs_code": bool}
_LISTS = ("requirements", "requirements_no_deps", "setup", "download", "egress", "data_files")
_DATA = "data"
_RESOURCES = "resources"


def home() -> Path:
    """Where installed environments and staged sources are kept: `$ROLLOUT_HOME`, or `rollout` in the user's data."""
    if chosen := os.environ.get("ROLLOUT_HOME"):
        return Path(chosen).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "rollout"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one sandbox of an environment may use where the backend can bound it; sizes in MiB, 0 for no bound.

    `memory_mb` is memory and swap together, `tmp_mb` and `shm_mb` are /tmp and /dev/shm, which are memory too; `pids`
    counts processes and threads.
    """

    cpus: float = 1.0
    memory_mb: int = 2048
    pids: int = 128
    tmp_mb: int = 64
    shm_mb: int = 16


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """One environment as its declaration says. `folder` holds its files."""

    name: str
    folder: Path
    description: str
    licence: str
    requirements: tuple[str, ...]
    requirements_no_deps: tuple[str, ...]
    """Installed with `--no-deps`: their own dependencies are not wanted."""
    isolation: str
    deterministic: bool
    runs_code: bool
    resources: Resources = Resources()
    setup: tuple[str, ...] = ()
    """Arguments of its venv's Python, run once when its packages are in; they may write into the venv."""
    download: tuple[str, ...] = ()
    """Arguments of its venv's Python that download its data into the working directory."""
    egress: tuple[str, ...] = ()
    """Destinations (`HOST:PORT`) that its sandboxes may reach, where the backend walls them off."""
    data: str = ""
    """What data it takes and where that is to be had, for people; empty for one that takes none."""
    data_files: tuple[str, ...] = ()
    """The files that its data must have, below their folder, or patterns that must fit some; none named: any."""
    source: str = BUILT_IN
    """Who brings it: the project, or another distribution."""

    @property
    def data_folder(self) -> Path | None:
        """Its registered data, if there is any (`rollout env data`)."""
        return registered(home() / "data", self.name) if self.data else None

    @property
    def digest(self) -> str:
        """16 hex digits over all that decides a trajectory; read from the files at each call."""
        return _digest(self, _sources(self))

    @property
    def requirements_digest(self) -> str:
        """16 hex digits over all that makes its venv, and the Python it is made for."""
        python = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
        setup = ("--setup", *self.setup) if self.setup else ()
        return _hash(python, *self.requirements, "--no-deps", *self.requirements_no_deps, *setup)

    @property
    def venv(self) -> Path | None:
        """Where its own venv lies or will lie; None where the host's interpreter serves it."""
        if not (self.requirements or self.requirements_no_deps or self.setup):
            return None
        return home() / "envs" / f"{self.name}-{self.requirements_digest}"

    @property
    def installed(self) -> bool:
        """Whether its interpreter is ready. A venv gets its name only when it is complete."""
        return self.venv is None or (self.venv / "bin" / "python").exists()

    def interpreter(self) -> Path:
        """The Python that runs its sandboxes. Raises Unavailable where it is not installed."""
        if self.venv is None:
            return Path(sys.executable)
        if not self.installed:
            raise Unavailable(f"environment {self.name!r} is not installed: run `rollout env install {self.name}`")
        return self.venv / "bin" / "python"


def names() -> list[str]:
    """All environments, sorted. Raises UsageError where an installed package brings one that cannot be."""
    return list(places())


def find(name: str) -> EnvironmentSpec:
    """The environment called `name`. Raises UnknownName with the known names, UsageError for a bad declaration."""
    known = places()
    if name not in known:
        raise unknown("environment", name, list(known))
    return read(known[name].folder(), name=name, source=known[name].source)


def read(folder: Path, *, name: str | None = None, source: str = BUILT_IN) -> EnvironmentSpec:
    """Read a folder's declaration. Raises UsageError that names the file and the key."""
    path = folder / DECLARATION
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    known = [*_TEXTS, *_LISTS, _DATA, _RESOURCES]
    if unexpected := sorted(table.keys() - set(known)):
        raise UsageError(f"{path}: unknown key {unexpected[0]!r}; known: {', '.join(known)}")
    for key, kind in _TEXTS.items():
        if not isinstance(table.get(key), kind):
            raise UsageError(f"{path}: {key!r} must be given, as {'a string' if kind is str else 'true or false'}")
    lists = {key: table.get(key, []) for key in _LISTS}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{path}: {key!r} must be a list of strings")
    if table["name"] != (name or folder.name):
        what = "the folder's name" if name is None else "its entry point's name"
        raise UsageError(f"{path}: 'name' must be {what}, {name or folder.name!r}")
    if not isinstance(data := table.get(_DATA, ""), str):
        raise UsageError(f"{path}: 'data' must be a string that says what data it takes and where to get it")
    if table["isolation"] not in ISOLATIONS:
        raise UsageError(f"{path}: 'isolation' must be one of {', '.join(ISOLATIONS)}")
    values = {key: table[key] for key in _TEXTS} | {key: tuple(value) for key, value in lists.items()}
    resources = _resources(path, table.get(_RESOURCES, {}))
    return EnvironmentSpec(folder=folder, resources=resources, data=data, source=source, **values)


def _resources(path: Path, table: object) -> Resources:
    known = [field.name for field in fields(Resources)]
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {_RESOURCES!r} must be a table of {', '.join(known)}")
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{path}: unknown key {f'{_RESOURCES}.{key}'!r}; known: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | (float if key == "cpus" else int)) or value < 0:
            raise UsageError(f"{path}: {f'{_RESOURCES}.{key}'!r} must be a number, 0 for no bound")
    return Resources(**table)


def stage(spec: EnvironmentSpec) -> Path:
    """Lay out what runs inside its sandboxes; the path to put on PYTHONPATH, holding `backends/` and nothing else.

    Idempotent and safe against concurrent callers: the tree is written under a temporary name and renamed.
    """
    sources = _sources(spec)
    target = home() / "stage" / _digest(spec, sources)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        for name, content in sources.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        building.chmod(0o755)
        _rename(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _rename(building: Path, target: Path) -> None:
    try:
        building.rename(target)
    except OSError:
        if not target.is_dir():  # not another caller's identical tree
            raise


def _sources(spec: EnvironmentSpec) -> dict[str, bytes]:
    """Every staged file: path below the staging root -> content, in a fixed order."""
    found = {
        "backends/__init__.py": _BACKENDS / "__init__.py",
        "backends/environments/__init__.py": FOLDER / "__init__.py",
    }
    for prefix, folder in (
        ("backends/server", _BACKENDS / "server"),
        (f"backends/environments/{spec.name}", spec.folder),
    ):
        found.update({f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in _files(folder)})
    return {name: found[name].read_bytes() for name in sorted(found)}


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("."):
            yield path


def _digest(spec: EnvironmentSpec, sources: dict[str, bytes]) -> str:
    texts = [*spec.requirements, "--no-deps", *spec.requirements_no_deps]
    if folder := spec.data_folder:
        texts.append(digest_of(folder))
    return _hash(*texts, *(part for pair in sources.items() for part in pair))


def _hash(*parts: str | bytes) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))  # so that no two lists of parts run together
        digest.update(raw)
    return digest.hexdigest()

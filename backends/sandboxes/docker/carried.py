"""Images that carry an environment's registered data, for daemons that cannot mount this machine's folders.

Such an image is the environment's own (or the user's) with one layer more. Its label says of which data and of which
image it was made: others are never taken for it.
"""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from typing import IO, TYPE_CHECKING, Final

from backends.environments.data import VARIABLE, digest_of
from backends.sandboxes.docker.base import add_bytes
from backends.sandboxes.docker.port import NotThere, Step

if TYPE_CHECKING:
    from pathlib import Path

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Engine, Progress

CARRIES: Final = "rollout.carries"
"""Label of images: the digest of the data, and the id of the image below it."""
FOLDER: Final = "/data"
"""Where servers in containers find the data."""


async def carrying(engine: Engine, spec: EnvironmentSpec, image: str, folder: Path, progress: Progress) -> str:
    """The name of an image like `image` with the data of `folder` in it: found, else built. Raises EngineError."""
    data, below = digest_of(folder), (await engine.image_id(image)).removeprefix("sha256:")
    name, wanted = f"rollout-{spec.name}-data:{data}-{below[:12]}", f"{data} {below}"
    try:
        found = (await engine.image_labels(name)).get(CARRIES)
    except NotThere:
        found = None
    if found != wanted:
        progress(Step(f"{spec.name}: sending its data to the Docker daemon at {engine.url}"))
        with await asyncio.to_thread(_context, image, folder) as context:
            await engine.build(context, progress, tag=name, labels={CARRIES: wanted}, arguments={})
        progress(Step(f"{spec.name}: built {name}"))
    return name


def _context(image: str, folder: Path) -> IO[bytes]:
    context = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add_bytes(tar, "Dockerfile", f"FROM {image}\nCOPY data {FOLDER}\nENV {VARIABLE}={FOLDER}\n".encode())
        tar.add(folder, "data", filter=_nobodys)
    context.seek(0)
    return context


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Equal data make an equal layer, whoever has them, and every user may read them."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry

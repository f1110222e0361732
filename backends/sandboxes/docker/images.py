"""Images of environments: found, pulled, or built from what lies on this machine.

An image holds one environment at one content digest, which is its tag and its label: another digest is another image,
so a stale one is never taken for the right one. Its context is laid out here: the environment's own Dockerfile, the
staged sources, and a folder of wheels that the host's pip downloads, so that the build needs no network.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import tarfile
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from backends.environments.catalog import home, stage
from backends.sandboxes.docker.base import add_bytes, base_context, base_name
from backends.sandboxes.docker.port import EngineError, NotThere, Step
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Engine, Progress

ENVIRONMENT: Final = "rollout.environment"
DIGEST: Final = "rollout.digest"
BASE: Final = "rollout.base"
"""Labels of images; containers carry the first two as well."""
SERVER: Final = ("aiohttp>=3.14,<4", "orjson>=3.11")
"""What the server inside imports."""
PULL_BASE_S: Final = 60.0
"""A registry that has not begun to answer by then is none."""
DOWNLOAD_S: Final = 900.0
_BAKE: Final = Path(__file__).with_name("bake.py")
_TAIL: Final = 8


def image_name(spec: EnvironmentSpec, digest: str | None = None) -> str:
    """The image of an environment at a digest; without one as it is now, which reads its files."""
    return f"rollout-{spec.name}:{digest or spec.digest}"


async def ensure(
    engine: Engine, spec: EnvironmentSpec, image: str | None, progress: Progress, *, build_missing: bool = True
) -> str:
    """An image that serves exactly this environment, by name: the one there is, else pulled, else built.

    Only an image that was named is pulled: the name that this project makes up belongs to nobody in any registry.
    Raises Unavailable where it can be had in no way, and where the named one is of another digest.
    """
    digest = await asyncio.to_thread(lambda: spec.digest)
    name = image or image_name(spec, digest)
    try:
        labels = await engine.image_labels(name)
    except NotThere:
        if not build_missing:
            raise Unavailable(f"there is no image {name}: run `rollout image build {spec.name}`") from None
        if image is None or not await _pulled(engine, image, progress):
            await build(engine, spec, progress, tag=name)
        labels = await engine.image_labels(name)
    found = labels.get(DIGEST)
    if labels.get(ENVIRONMENT) != spec.name or found != digest:
        what = f"{labels.get(ENVIRONMENT)} {found}" if found else "no environment of this project"
        raise Unavailable(
            f"image {name} is stale: it holds {what}, and this is {spec.name} {digest}. Build it anew with "
            f"`rollout image build {spec.name} --tag {name}`, or leave the image to the backend"
        )
    return name


async def build(
    engine: Engine,
    spec: EnvironmentSpec,
    progress: Progress,
    *,
    tag: str | None = None,
    base: str | None = None,
    wheelhouse: Path | None = None,
) -> str:
    """Build an environment's image; its name. `wheelhouse` is a folder of wheels to use instead of a download.

    Raises Unavailable where something it needs cannot be had, EngineError where the build fails.
    """
    digest = await asyncio.to_thread(lambda: spec.digest)
    name = tag or image_name(spec, digest)
    chosen = base or await base_image(engine, progress)
    wheels = wheelhouse or await _download(spec, progress)
    progress(Step(f"{spec.name}: laying out the build on {chosen}"))
    context = await asyncio.to_thread(_context, spec, wheels)
    labels = {ENVIRONMENT: spec.name, DIGEST: digest}
    await engine.build(context, progress, tag=name, labels=labels, arguments={"BASE_IMAGE": chosen})
    progress(Step(f"{spec.name}: built {name}"))
    return name


async def build_base(engine: Engine, progress: Progress) -> str:
    """Make the base image from this machine's Python; its name. Raises Unavailable, EngineError."""
    name = base_name()
    progress(Step(f"copying {sys.executable} into {name}"))
    context = await asyncio.to_thread(base_context)
    await engine.build(context, progress, tag=name, labels={BASE: name}, arguments={})
    return name


async def found_or_pulled(engine: Engine, image: str, progress: Progress) -> None:
    """An image of somebody else's, as it is. Raises Unavailable where there is none and it cannot be pulled."""
    try:
        await engine.image_id(image)
    except NotThere:
        if not await _pulled(engine, image, progress):
            raise Unavailable(
                f"there is no image {image}, and no registry gives it: pull or build it where it can be had, then "
                "`docker save` it there and `docker load` it here"
            ) from None


async def base_image(engine: Engine, progress: Progress) -> str:
    """A base image with the Python that the host's pip downloads for; made where there is none."""
    official = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    for name in (base_name(), official):
        try:
            await engine.image_labels(name)
        except NotThere:
            continue
        return name
    if await _pulled(engine, official, progress, within_s=PULL_BASE_S):
        return official
    return await build_base(engine, progress)


async def _pulled(engine: Engine, image: str, progress: Progress, *, within_s: float | None = None) -> bool:
    try:
        await engine.pull(image, progress, **({} if within_s is None else {"within_s": within_s}))
    except EngineError as error:
        progress(Step(f"{image} cannot be pulled ({str(error).splitlines()[0]})"))
        return False
    return True


def _requirements(spec: EnvironmentSpec) -> tuple[list[str], list[str]]:
    return sorted({*SERVER, *spec.requirements}), list(spec.requirements_no_deps)


async def _download(spec: EnvironmentSpec, progress: Progress) -> Path:
    """A folder with the wheels of an environment, complete as soon as it is visible."""
    requirements, alone = _requirements(spec)
    key = blake2b(orjson.dumps([sys.version_info[:2], requirements, alone]), digest_size=8).hexdigest()
    wheels = home() / "wheels" / f"{spec.name}-{key}"
    if await asyncio.to_thread(wheels.is_dir):
        return wheels
    partial = wheels.with_name(f".{wheels.name}-{os.getpid()}")
    await asyncio.to_thread(partial.mkdir, parents=True, exist_ok=True)
    progress(Step(f"{spec.name}: downloading {', '.join((*requirements, *alone))}"))
    for flags, names in (([], [*requirements, "pip"]), (["--no-deps"], alone)):
        if names:
            await _pip(["download", "--only-binary=:all:", "-d", str(partial), *flags, *names])
    await asyncio.to_thread(_publish, partial, wheels)
    return wheels


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


def _context(spec: EnvironmentSpec, wheels: Path) -> io.BytesIO:
    requirements, alone = _requirements(spec)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add_bytes(tar, "Dockerfile", (spec.folder / "Dockerfile").read_bytes())
        add_bytes(tar, "bake.py", _BAKE.read_bytes())
        lists = {"requirements": requirements, "requirements_no_deps": alone, "setup": spec.setup}
        add_bytes(tar, "wheels/requirements.json", orjson.dumps(lists))
        for wheel in sorted(wheels.glob("*.whl")):
            add_bytes(tar, f"wheels/{wheel.name}", wheel.read_bytes())
        staged = stage(spec)
        for path in sorted(path for path in staged.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            add_bytes(tar, f"stage/{path.relative_to(staged).as_posix()}", path.read_bytes())
    context.seek(0)
    return context

"""Images of environments: found, pulled, or built from what lies on this machine.

An image holds one environment at one content digest, which is its tag and its label: another digest is another image,
so a stale one is never taken for the right one. Its context is laid out here: the environment's own Dockerfile, the
staged sources, and a folder of wheels that the host's pip downloads, so that the build needs no network.
"""

from __future__ import annotations

import asyncio
import io
import platform
import sys
import tarfile
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final

import orjson

from backends.environments.catalog import stage
from backends.sandboxes.docker import wheels
from backends.sandboxes.docker.base import add_bytes, base_context, base_name
from backends.sandboxes.docker.port import EngineError, NotThere, Step
from backends.sandboxes.docker.wheels import SERVER, requirements_of
from orchestrator.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from backends.environments.catalog import EnvironmentSpec
    from backends.sandboxes.docker.port import Engine, Progress

ENVIRONMENT: Final = "rollout.environment"
DIGEST: Final = "rollout.digest"
RECIPE: Final = "rollout.recipe"
BASE: Final = "rollout.base"
"""Labels of images; containers carry the first two as well. The last two say how an image was made."""
PULL_BASE_S: Final = 60.0
"""A registry that has not begun to answer by then is none."""
_BAKE: Final = Path(__file__).with_name("bake.py")
_BASE: Final = Path(__file__).with_name("base.py")


def image_name(spec: EnvironmentSpec, digest: str | None = None) -> str:
    """The image of an environment at a digest; without one as it is now, which reads its files."""
    return f"rollout-{spec.name}:{digest or spec.digest}"


async def ensure(
    engine: Engine, spec: EnvironmentSpec, image: str | None, progress: Progress, *, build_missing: bool = True
) -> str:
    """An image that serves exactly this environment, by name: the one there is, else pulled, else built.

    Only an image that was named is pulled: the name that this project makes up belongs to nobody in any registry, and
    an image of that name that was made in another way than now is made anew. Raises Unavailable where it can be had in
    no way, and where the named one holds something else.
    """
    digest = await asyncio.to_thread(lambda: spec.digest)
    name = image or image_name(spec, digest)
    if (labels := await _labels(engine, name)) is None:
        if not build_missing:
            raise Unavailable(f"there is no image {name}: run `rollout image build {spec.name}`")
        if image is None or not await _pulled(engine, image, progress):
            await build(engine, spec, progress, tag=name)
        labels = await engine.image_labels(name)
    if image is None and build_missing and labels.get(RECIPE) != await asyncio.to_thread(recipe):
        return await build(engine, spec, progress, tag=name)
    if labels.get(ENVIRONMENT) != spec.name:
        holds = f"environment {labels[ENVIRONMENT]}" if ENVIRONMENT in labels else "no environment of this project"
        raise Unavailable(
            f"image {name} holds {holds}, not {spec.name}: name one that `rollout image build {spec.name} --tag IMAGE` "
            "has made, or leave the image to the backend"
        )
    if (found := labels.get(DIGEST)) != digest:
        raise Unavailable(
            f"image {name} is stale: it holds {spec.name} {found}, and this is {digest}. Build it anew with "
            f"`rollout image build {spec.name} --tag {name}`, or leave the image to the backend"
        )
    return name


def current(spec: EnvironmentSpec, labels: Mapping[str, str]) -> bool:
    """Whether an image with these labels holds the environment as it is now, made as images are made now."""
    return (labels.get(ENVIRONMENT), labels.get(DIGEST), labels.get(RECIPE)) == (spec.name, spec.digest, recipe())


def recipe() -> str:
    """How images are made: 16 hex digits over what an environment's own digest does not cover."""
    python = ".".join(map(str, sys.version_info[:2]))
    parts = (_BAKE.read_bytes(), _BASE.read_bytes(), *map(str.encode, (python, *SERVER)))
    return blake2b(b"\0".join(parts), digest_size=8).hexdigest()


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
    if engine.remote and wheelhouse is None:
        await _check_architecture(engine, spec)
    digest = await asyncio.to_thread(lambda: spec.digest)
    name = tag or image_name(spec, digest)
    if wheelhouse is not None:
        await asyncio.to_thread(wheels.check, wheelhouse, spec)
    if base is not None:
        await found_or_pulled(engine, base, progress)
    chosen = base or await base_image(engine, progress)
    folder = wheelhouse or await wheels.download(spec, progress)
    progress(Step(f"{spec.name}: laying out the build on {chosen}"))
    context = await asyncio.to_thread(_context, spec, folder)
    labels = {ENVIRONMENT: spec.name, DIGEST: digest, RECIPE: await asyncio.to_thread(recipe)}
    await engine.build(context, progress, tag=name, labels=labels, arguments={"BASE_IMAGE": chosen})
    progress(Step(f"{spec.name}: built {name}"))
    return name


async def build_base(engine: Engine, progress: Progress) -> str:
    """Make the base image from this machine's Python; its name. Raises Unavailable, EngineError."""
    name = base_name()
    progress(Step(f"copying {sys.executable} into {name}"))
    context = await asyncio.to_thread(base_context)
    labels = {BASE: await asyncio.to_thread(recipe)}
    await engine.build(context, progress, tag=name, labels=labels, arguments={})
    return name


async def found_or_pulled(engine: Engine, image: str, progress: Progress, *, pull_missing: bool = True) -> None:
    """An image of somebody else's, as it is. Raises Unavailable where there is none and it cannot be pulled."""
    try:
        await engine.image_id(image)
    except NotThere:
        if not (pull_missing and await _pulled(engine, image, progress)):
            raise Unavailable(
                f"there is no image {image}, and no registry gives it: pull or build it where it can be had, then "
                "`docker save` it there and `docker load` it here"
            ) from None


async def base_image(engine: Engine, progress: Progress) -> str:
    """A base image with the Python that the host's pip downloads for; made where there is none, and made anew where
    it was made in another way than now."""
    official = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    if (labels := await _labels(engine, base_name())) is not None:
        as_now = labels.get(BASE) == await asyncio.to_thread(recipe)
        return base_name() if as_now else await build_base(engine, progress)
    if await _labels(engine, official) is not None or await _pulled(engine, official, progress, within_s=PULL_BASE_S):
        return official
    return await build_base(engine, progress)


async def _check_architecture(engine: Engine, spec: EnvironmentSpec) -> None:
    here, there = platform.machine(), (await engine.info())["Architecture"]
    if there != here:
        raise Unavailable(
            f"the machine of the Docker daemon at {engine.url} is {there} and this one {here}, whose wheels and Python "
            f"do not run there: run `rollout image build {spec.name}` on that machine, then use it from here"
        )


async def _labels(engine: Engine, image: str) -> Mapping[str, str] | None:
    """The labels of an image; None where there is no such image."""
    try:
        return await engine.image_labels(image)
    except NotThere:
        return None


async def _pulled(engine: Engine, image: str, progress: Progress, *, within_s: float | None = None) -> bool:
    try:
        await engine.pull(image, progress, **({} if within_s is None else {"within_s": within_s}))
    except EngineError as error:
        progress(Step(f"{image} cannot be pulled ({str(error).splitlines()[0]})"))
        return False
    return True


def _context(spec: EnvironmentSpec, folder: Path) -> io.BytesIO:
    requirements, alone = requirements_of(spec)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add_bytes(tar, "Dockerfile", (spec.folder / "Dockerfile").read_bytes())
        add_bytes(tar, "bake.py", _BAKE.read_bytes())
        lists = {"requirements": requirements, "requirements_no_deps": alone, "setup": spec.setup}
        add_bytes(tar, "wheels/requirements.json", orjson.dumps(lists))
        for wheel in sorted(folder.glob("*.whl")):
            add_bytes(tar, f"wheels/{wheel.name}", wheel.read_bytes())
        staged = stage(spec)
        for path in sorted(path for path in staged.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            add_bytes(tar, f"stage/{path.relative_to(staged).as_posix()}", path.read_bytes())
    context.seek(0)
    return context

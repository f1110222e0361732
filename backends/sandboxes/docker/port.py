"""The few calls to the Docker engine that this project makes: each with a deadline, each failing in our own words.

Owns the connection to one daemon. Always true: no call waits without a bound, none raises a type of the client library,
and a daemon that is gone (`EngineGone`) is told apart from one that refuses (`EngineRefused`), from a thing that does
not exist (`NotThere`) and from a call that did not end in time (`EngineTimeout`).
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, Self

import aiohttp

from backends.sandboxes.docker.endpoint import find
from orchestrator.errors import RolloutError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    import aiodocker
    from aiodocker.stream import Stream

    from backends.sandboxes.docker.endpoint import Endpoint

    Progress = Callable[["Step"], None]
    """Takes how far a build or a pull has come."""

CALL_S: Final = 30.0
"""A call that only asks or sets something, on a machine with nothing left to give."""
START_S: Final = 120.0
"""Starts queue up inside the daemon."""
REMOVE_S: Final = 60.0
BUILD_S: Final = 1800.0
PULL_S: Final = 1800.0
PULL_SILENT_S: Final = 600.0
"""A large layer is unpacked without a word."""
POLL_S: Final = 0.1
_IN_PROGRESS: Final = 409
_UNREACHABLE: Final = 900
"""The client library's status for a daemon that does not answer at all."""
_CHUNK: Final = 1024 * 1024
_STEP: Final = re.compile(r"Step (\d+)/(\d+) : (.*)", re.DOTALL)
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_NAMELESS: Final = "<none>:<none>"
_TAIL: Final = 12
"""Lines of a failed build that go into the error."""


class EngineError(RolloutError):
    """The base of what a call to the daemon can raise."""


class EngineGone(EngineError):
    """The daemon cannot be reached. `asked` is False where the call cannot have come to it."""

    def __init__(self, message: str, *, asked: bool = True) -> None:
        super().__init__(message)
        self.asked = asked


class EngineTimeout(EngineError):
    """A call did not end in time; whether it had an effect is unknown."""


class EngineRefused(EngineError):
    """The daemon answered with an error; `status` is that of HTTP, 0 inside of a stream."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotThere(EngineRefused):
    """The container, image or network does not exist."""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """What the daemon says of one container. `pid` is its first process on this machine, 0 when none runs."""

    id: str
    running: bool
    paused: bool
    pid: int
    exit_code: int
    oom_killed: bool
    error: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A container, image or network in a list: its id, its names and its labels."""

    id: str
    names: Sequence[str]
    labels: Mapping[str, str]
    state: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a build or a pull: `done` of `total` (0: not known), and what it is about."""

    text: str
    done: int = 0
    total: int = 0


class Engine:
    """One daemon. Make it with `connect`."""

    def __init__(self, client: aiodocker.Docker, connector: aiohttp.BaseConnector, endpoint: Endpoint) -> None:
        self._client = client
        self._connector = connector
        self.endpoint = endpoint

    @property
    def url(self) -> str:
        """Where the daemon is; `connect` finds it there again."""
        return self.endpoint.url

    @property
    def remote(self) -> bool:
        """Whether the daemon is reached over TCP: it sees none of this machine's files, and this one none of its
        processes."""
        return self.endpoint.remote

    @classmethod
    async def connect(cls, url: str | None = None) -> Self:
        """Reach the daemon of `url`, or of DOCKER_HOST, the current context or the usual socket.

        Raises Unavailable where there is none.
        """
        endpoint = await find(url)
        import aiodocker

        connector = endpoint.connector()
        engine = cls(aiodocker.Docker(url=endpoint.base, connector=connector), connector, endpoint)
        try:
            await engine.version()
        except EngineError as error:
            await engine.close()
            raise Unavailable(await asyncio.to_thread(endpoint.unreachable, error)) from None
        return engine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the daemon."""
        await self._client.close()
        await self._connector.close()

    async def version(self) -> Mapping[str, Any]:
        """What the daemon says of itself."""
        async with _call("version", 5.0):
            return await self._client.version()

    async def info(self) -> Mapping[str, Any]:
        """How the daemon is set up."""
        async with _call("info", CALL_S):
            return await self._client.system.info()

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container; its id. Raises NotThere where the image is missing."""
        async with _call(f"create container {name}", CALL_S):
            return (await self._client.containers.create(dict(config), name=name)).id

    async def attach(self, container: str) -> Attachment:
        """Take hold of a container's standard streams; before its start, so that nothing is missed."""
        stream = self._client.containers.container(container).attach(stdin=True, stdout=True, stderr=True)
        async with _call(f"attach to {container}", CALL_S):
            await stream.__aenter__()
        return Attachment(stream)

    async def start(self, container: str) -> None:
        """Start a container."""
        async with _call(f"start container {container}", START_S):
            await self._client.containers.container(container).start()

    async def mounted(self, container: str, target: str) -> str:
        """What a container sees at `target`: its path on the daemon's machine."""
        async with _call(f"inspect container {container}", CALL_S):
            body = await self._client.containers.container(container).show()
        return next(str(one["Source"]) for one in body["Mounts"] if one["Destination"] == target)

    async def inspect(self, container: str) -> ContainerState:
        """How a container stands. Raises NotThere."""
        async with _call(f"inspect container {container}", CALL_S):
            body = await self._client.containers.container(container).show()
        state = body["State"]
        return ContainerState(
            id=body["Id"],
            running=bool(state["Running"]),
            paused=bool(state["Paused"]),
            pid=int(state["Pid"]),
            exit_code=int(state["ExitCode"]),
            oom_killed=bool(state["OOMKilled"]),
            error=str(state["Error"]),
        )

    async def remove(self, container: str, *, within_s: float = REMOVE_S) -> None:
        """Kill and remove a container, and wait until it is gone; one that is gone already is no error."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + within_s
        while True:
            try:
                async with _call(f"remove container {container}", max(ends - loop.time(), 0.0)):
                    return await self._client.containers.container(container).delete(force=True, v=True)
            except NotThere:
                return None
            except EngineRefused as error:
                if error.status != _IN_PROGRESS or loop.time() >= ends:
                    raise
            await asyncio.sleep(POLL_S)  # somebody else is removing it: until they have

    async def containers(self, labels: Mapping[str, str | None]) -> list[Listed]:
        """All containers, ended ones too, that carry the labels; a value of None asks for the label alone."""
        filters = json.dumps({"label": _label_filter(labels)})
        async with _call("list containers", CALL_S):
            found = await self._client.containers.list(all=1, filters=filters)
        return [_listed(one) for one in found]

    async def images(self, labels: Mapping[str, str | None]) -> list[Listed]:
        """All images that carry the labels; those that have lost their name to a newer one have none."""
        async with _call("list images", CALL_S):
            found = await self._client.images.list(filters={"label": _label_filter(labels)})
        return [
            Listed(one["Id"], [name for name in one["RepoTags"] or () if name != _NAMELESS], one["Labels"] or {})
            for one in found
        ]

    async def image_labels(self, image: str) -> Mapping[str, str]:
        """The labels of an image. Raises NotThere."""
        async with _call(f"inspect image {image}", CALL_S):
            body = await self._client.images.inspect(image)
        return body["Config"]["Labels"] or {}

    async def image_id(self, image: str) -> str:
        """The digest of an image's content. Raises NotThere."""
        async with _call(f"inspect image {image}", CALL_S):
            return str((await self._client.images.inspect(image))["Id"])

    async def pull(self, image: str, progress: Progress, *, within_s: float = PULL_S) -> None:
        """Fetch an image from its registry, with progress in bytes. `within_s` bounds the wait for its first sign of
        life; from then on only silence is too long."""
        layers: dict[str, tuple[int, int]] = {}
        loop = asyncio.get_running_loop()
        async with _call(f"pull {image}", within_s) as deadline:
            async for one in self._client.images.pull(image, stream=True):
                deadline.reschedule(loop.time() + PULL_SILENT_S)
                detail = one.get("progressDetail") or {}
                if one.get("status") == "Downloading" and detail.get("total"):
                    layers[one.get("id", "")] = (int(detail["current"]), int(detail["total"]))
                done, total = (sum(part) for part in zip(*layers.values(), strict=True)) if layers else (0, 0)
                progress(Step(f"pulling {image}: {one.get('status', '')}", done, total))

    async def build(
        self,
        context: IO[bytes],
        progress: Progress,
        *,
        tag: str,
        labels: Mapping[str, str],
        arguments: Mapping[str, str],
    ) -> None:
        """Build an image from a tar of its context, with progress in steps of the Dockerfile."""
        said: list[str] = []
        try:
            async with _call(f"build {tag}", BUILD_S):
                async for one in self._client.images.build(
                    fileobj=_Chunks(context),
                    encoding="identity",
                    tag=tag,
                    labels=labels,
                    buildargs=arguments,
                    forcerm=True,  # the container of a step that fails would stay, and be nobody's
                    stream=True,
                ):
                    said.append(text := _COLOURS.sub("", str(one.get("stream", ""))).strip())
                    if found := _STEP.fullmatch(text):  # the rest is chatter, for the error if there is one
                        progress(Step(found[3], int(found[1]) - 1, int(found[2])))
        except EngineRefused as error:
            spoken = [line for text in said for line in text.splitlines() if line.strip()]
            lines = "\n".join(f"    {line}" for line in spoken[-_TAIL:])
            raise EngineRefused(f"{error}\n{lines}", error.status) from None

    def __repr__(self) -> str:
        return f"<Engine {self.url}>"


class Attachment:
    """A container's standard streams. While it is open the container's standard input is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def write(self, data: bytes) -> None:
        """To standard input. Raises EngineGone where the container has ended."""
        try:
            async with _call("write to a container", CALL_S):
                await self._stream.write_in(data)
        except AssertionError:  # what the client library raises where the connection has ended
            raise EngineGone("write to a container: it has ended, or the Docker daemon has") from None

    async def read(self) -> bytes:
        """What the container has written next, to either stream; empty at its end, or the daemon's."""
        try:
            message = await self._stream.read_out()  # waits as long as the container is silent: its owner cancels
        except (aiohttp.ClientError, OSError):
            return b""
        return b"" if message is None else message.data

    async def close(self) -> None:
        """Let go; the container reads the end of its standard input."""
        await self._stream.close()


class _Chunks:
    """The client library reads a context in pieces of 8 KiB; these are larger."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        return self._source.read(_CHUNK)


@asynccontextmanager
async def _call(what: str, within_s: float) -> AsyncIterator[asyncio.Timeout]:
    """A deadline, which is yielded, and the client library's errors in our own words."""
    from aiodocker.exceptions import DockerError

    try:
        async with asyncio.timeout(within_s) as deadline:
            yield deadline
    except TimeoutError:
        raise EngineTimeout(f"{what}: no answer from the Docker daemon within {within_s:g} s") from None
    except DockerError as error:
        if error.status == _UNREACHABLE:
            asked = not isinstance(error.__context__, aiohttp.ClientConnectorError)
            raise EngineGone(f"{what}: {error.message}", asked=asked) from None
        kind = NotThere if error.status == 404 else EngineRefused
        raise kind(f"{what}: {error.message}", error.status) from None
    except (aiohttp.ClientError, OSError) as error:
        raise EngineGone(f"{what}: {str(error) or type(error).__name__}") from None


def _label_filter(labels: Mapping[str, str | None]) -> list[str]:
    return [name if value is None else f"{name}={value}" for name, value in labels.items()]


def _listed(container: Any) -> Listed:
    names = [name.lstrip("/") for name in container["Names"]]
    return Listed(container.id, names, container["Labels"] or {}, container["State"])

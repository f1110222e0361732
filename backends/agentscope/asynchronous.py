"""The same boxes for asyncio: every call is a coroutine of the loop that first used the box.

A box belongs to one loop. It ends at `close`, on leaving it, or with the loop; one that nothing refers to any more is
closed in the background. Boxes of one kind in one loop share its sandboxes. A cancelled call leaves its instance where
it stood before. Errors are `RolloutError`s, as in `boxes`.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any, Self

from backends.agentscope.boxes import APPWorldSandbox, BFCLSandbox, TrainingSandbox, WebShopSandbox
from backends.agentscope.desk import described
from backends.agentscope.kinds import WAIT_S, bounded, checked
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from typing import ClassVar

    from backends.agentscope.desk import Desk
    from backends.agentscope.registry import SandboxType


class AsyncSandbox:
    """What every async box has. The arguments are those of `Sandbox`. Raises UsageError, UnknownName."""

    blocking: ClassVar[type] = TrainingSandbox
    """The blocking class that is registered for the same kind."""

    def __init__(
        self,
        sandbox_id: str | None = None,
        timeout: float = WAIT_S,
        base_url: str | None = None,
        bearer_token: str | None = None,
        box_type: SandboxType | str | None = None,
    ) -> None:
        self._kind = checked(self.blocking, box_type, sandbox_id, timeout, base_url, bearer_token)
        self._desk: Desk | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False

    @property
    def sandbox_type(self) -> SandboxType:
        """Its kind."""
        return self._kind.sandbox_type

    async def start(self) -> Self:
        """Start it now. Raises RolloutError: it cannot run here, or the server refuses it."""
        await self._do("start", self._opened().start())
        return self

    async def sandbox_id(self) -> str:
        """Its id; starts it where it has not been started."""
        return str(await self._do("start", self._opened().start()))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Release all its instances and what serves them. Idempotent. Raises RolloutError: a server was not told."""
        self._closed = True
        desk, self._desk = self._desk, None
        if desk is not None:
            if self._finalizer is not None:
                self._finalizer.detach()
            await desk.close()

    async def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call one of the box's tools (see `list_tools`) by name. Raises RolloutError."""
        return await self._do(name, self._opened().call(name, dict(arguments or {})))

    async def get_info(self, instance_id: str | None = None) -> Any:
        """The box's record; with an `instance_id` the tools of that instance, as text."""
        if instance_id is not None:
            return await self.call_tool("get_instance_info", {"instance_id": instance_id})
        return await self._do("get_info", self._opened().info())

    async def list_tools(self, tool_type: str | None = None, instance_id: str | None = None) -> Any:
        """The box's tools as `{"training": {name: {"name", "json_schema"}}}`; with an `instance_id` as `get_info`."""
        return described(tool_type) if instance_id is None else await self.get_info(instance_id)

    async def _do(self, what: str, work: Coroutine[Any, Any, Any]) -> Any:
        return await bounded(work, self._kind.timeout, what)

    def _opened(self) -> Desk:
        if self._closed:
            raise UsageError("the box is closed: make another one")
        loop = asyncio.get_running_loop()
        if self._desk is None:
            self._loop, self._desk = loop, self._kind.desk()
            self._finalizer = weakref.finalize(self, _close_later, loop, self._desk)
            self._finalizer.atexit = False  # the loop has ended by then, and the desk with it
        elif self._loop is not loop:
            raise UsageError("an async box belongs to the event loop that used it first: make one in each loop")
        return self._desk

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._desk is not None else "ready"
        return f"<{type(self).__name__} {self._kind.sandbox_type} {state}>"


class AsyncTrainingSandbox(AsyncSandbox):
    """`TrainingSandbox` for asyncio: each method takes, returns and raises the same."""

    async def get_env_profile(
        self, env_type: str | None = None, split: str = "train", params: Mapping[str, Any] | None = None
    ) -> list[str]:
        """See `TrainingSandbox.get_env_profile`."""
        arguments = {"env_type": env_type, "split": split, "params": params}
        ids: list[str] = await self.call_tool("get_env_profile", arguments)
        return ids

    async def get_task_ids(
        self, env_type: str | None = None, split: str = "train", params: Mapping[str, Any] | None = None
    ) -> list[str]:
        """See `TrainingSandbox.get_task_ids`."""
        arguments = {"env_type": env_type, "split": split, "params": params}
        ids: list[str] = await self.call_tool("get_task_ids", arguments)
        return ids

    async def create_instance(
        self,
        env_type: str | None = None,
        task_id: str | None = None,
        instance_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """See `TrainingSandbox.create_instance`. Cancelled: there is no instance."""
        arguments = {"env_type": env_type, "task_id": task_id, "instance_id": instance_id, "params": params}
        created: dict[str, Any] = await self.call_tool("create_instance", arguments)
        return created

    async def step(
        self, instance_id: str, action: Mapping[str, Any] | str | None = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `TrainingSandbox.step`."""
        arguments = {"instance_id": instance_id, "action": action or {}, "params": params or {}}
        answered: dict[str, Any] = await self.call_tool("step", arguments)
        return answered

    async def evaluate(
        self, instance_id: str, messages: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> float | dict[str, Any]:
        """See `TrainingSandbox.evaluate`."""
        arguments = {"instance_id": instance_id, "messages": messages or {}, "params": params or {}}
        score: float | dict[str, Any] = await self.call_tool("evaluate", arguments)
        return score

    async def release_instance(self, instance_id: str) -> bool:
        """See `TrainingSandbox.release_instance`."""
        released: bool = await self.call_tool("release_instance", {"instance_id": instance_id})
        return released


class AsyncAPPWorldSandbox(AsyncTrainingSandbox):
    """`APPWorldSandbox` for asyncio."""

    blocking = APPWorldSandbox


class AsyncBFCLSandbox(AsyncTrainingSandbox):
    """`BFCLSandbox` for asyncio."""

    blocking = BFCLSandbox


class AsyncWebShopSandbox(AsyncTrainingSandbox):
    """`WebShopSandbox` for asyncio."""

    blocking = WebShopSandbox


_closing: set[asyncio.Task[None]] = set()


def _close_later(loop: asyncio.AbstractEventLoop, desk: Desk) -> None:
    """Close the desk of a box that is gone; nothing to do where its loop has ended."""
    try:
        loop.call_soon_threadsafe(_start_closing, desk)
    except RuntimeError:
        pass  # the loop is closed, and its tasks ended with it


def _start_closing(desk: Desk) -> None:
    task = asyncio.create_task(_closed(desk), name="close-abandoned-box")
    _closing.add(task)
    task.add_done_callback(_closing.discard)


async def _closed(desk: Desk) -> None:
    await desk.close()

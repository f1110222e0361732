"""The blocking boxes, as the training sandbox's users write them.

A box starts what it needs at its first call, or on entering it; it ends at `close`, on leaving it, when nothing refers
to it any more, or with the interpreter. Threads may share a box, and a box made before a fork starts anew in the child.
Every error is raised as a `RolloutError`; nothing comes back as a text that says so.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

from backends.agentscope.desk import described
from backends.agentscope.kinds import WAIT_S, bounded, checked
from backends.agentscope.registry import SandboxRegistry, SandboxType, get_image_tag
from backends.agentscope.thread import LoopThread
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from backends.agentscope.desk import Desk


class Sandbox:
    """What every blocking box has: a life, tools to call, a record.

    `sandbox_id` names the box, or one that the server has already; `timeout` bounds each call in seconds, the start of
    a sandbox included; `base_url` is a server's, with its `bearer_token`; without one this process serves the box
    itself. `box_type` is its kind. Raises UsageError, UnknownName.
    """

    def __init__(
        self,
        sandbox_id: str | None = None,
        timeout: float = WAIT_S,
        base_url: str | None = None,
        bearer_token: str | None = None,
        box_type: SandboxType | str | None = None,
    ) -> None:
        self._kind = checked(type(self), box_type, sandbox_id, timeout, base_url, bearer_token)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self._desk: Desk | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._closed = False

    @property
    def sandbox_type(self) -> SandboxType:
        """Its kind."""
        return self._kind.sandbox_type

    @property
    def base_url(self) -> str | None:
        """The server's address; None where this process serves the box."""
        return self._kind.base_url

    @property
    def timeout(self) -> float:
        """Seconds that one call may take."""
        return self._kind.timeout

    @property
    def sandbox_id(self) -> str:
        """Its id; starts it where it has not been started."""
        return str(self._do("start", lambda desk: desk.start()))

    def start(self) -> Self:
        """Start it now. Raises RolloutError: it cannot run here, or the server refuses it."""
        self._do("start", lambda desk: desk.start())
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all its instances and what serves them, and wait until they are gone. Idempotent."""
        with self._guard:
            self._closed = True
            thread, desk, self._thread, self._desk = self._thread, self._desk, None, None
            if self._finalizer is not None:
                self._finalizer.detach()
        if thread is not None and desk is not None and thread.pid == os.getpid():
            thread.give_back(desk)

    def call_tool(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call one of the box's tools (see `list_tools`) by name. Raises RolloutError."""
        return self._do(name, lambda desk: desk.call(name, dict(arguments or {})))

    def get_info(self, instance_id: str | None = None) -> Any:
        """The box's record; with an `instance_id` the tools of that instance, as text."""
        if instance_id is not None:
            return self.call_tool("get_instance_info", {"instance_id": instance_id})
        return self._do("get_info", lambda desk: desk.info())

    def list_tools(self, tool_type: str | None = None, instance_id: str | None = None) -> Any:
        """The box's tools as `{"training": {name: {"name", "json_schema"}}}`; with an `instance_id` as `get_info`."""
        return described(tool_type) if instance_id is None else self.get_info(instance_id)

    def _do(self, what: str, call: Callable[[Desk], Coroutine[Any, Any, Any]]) -> Any:
        thread, desk = self._opened()
        return thread.do(bounded(call(desk), self._kind.timeout, what))

    @property
    def _guard(self) -> threading.Lock:
        """This process's lock: a thread that held the parent's at a fork is not here to release it."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
        return self._lock

    def _opened(self) -> tuple[LoopThread, Desk]:
        """The loop thread and the desk: made at the first call, and again in the child of a fork."""
        with self._guard:
            if self._closed:
                raise UsageError("the box is closed: make another one")
            if self._thread is None or self._desk is None or self._thread.pid != os.getpid():
                if self._finalizer is not None:
                    self._finalizer.detach()
                self._desk = self._kind.desk()
                self._thread = LoopThread.take(self._desk)
                self._finalizer = weakref.finalize(self, self._thread.abandon, self._desk)
                self._finalizer.atexit = False  # the loop thread closes what is open then
            return self._thread, self._desk

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._desk is not None else "ready"
        return f"<{type(self).__name__} {self._kind.sandbox_type} {state}>"


class TrainingSandbox(Sandbox):
    """Tasks of an environment, each played in an instance of its own. The default kind is AppWorld."""

    def get_env_profile(
        self, env_type: str | None = None, split: str = "train", params: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The ids of a split's tasks, in the data's order. Raises UnknownName for a split that does not exist."""
        ids: list[str] = self.call_tool("get_env_profile", {"env_type": env_type, "split": split, "params": params})
        return ids

    def get_task_ids(
        self, env_type: str | None = None, split: str = "train", params: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The same as `get_env_profile`."""
        ids: list[str] = self.call_tool("get_task_ids", {"env_type": env_type, "split": split, "params": params})
        return ids

    def create_instance(
        self,
        env_type: str | None = None,
        task_id: str | None = None,
        instance_id: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Begin a task: `{"state": [messages], "info": {"instance_id", "task_id", ...}}`.

        `params` are the environment's own options, and `seed`. Raises SandboxRefused for a task that does not exist,
        UsageError for an id that is taken.
        """
        arguments = {"env_type": env_type, "task_id": task_id, "instance_id": instance_id, "params": params}
        created: dict[str, Any] = self.call_tool("create_instance", arguments)
        return created

    def step(
        self, instance_id: str, action: Mapping[str, Any] | str | None = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Answer an assistant message: `{"state": [message], "reward", "is_terminated", "info"}`.

        Raises UnknownName for an unknown instance, UsageError once its episode is over, SandboxError when this action
        ends its sandbox; then the instance stands where it stood before.
        """
        arguments = {"instance_id": instance_id, "action": action or {}, "params": params or {}}
        answered: dict[str, Any] = self.call_tool("step", arguments)
        return answered

    def evaluate(
        self, instance_id: str, messages: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> float | dict[str, Any]:
        """Grade an instance as it stands; it may go on afterwards. `{"sparse": True}` asks for 0.0 or 1.0."""
        arguments = {"instance_id": instance_id, "messages": messages or {}, "params": params or {}}
        score: float | dict[str, Any] = self.call_tool("evaluate", arguments)
        return score

    def release_instance(self, instance_id: str) -> bool:
        """Forget an instance; whether there was one."""
        released: bool = self.call_tool("release_instance", {"instance_id": instance_id})
        return released


@SandboxRegistry.register(
    f"agentscope/runtime-sandbox-appworld:{get_image_tag()}",
    sandbox_type=SandboxType.APPWORLD,
    runtime_config={"shm_size": "5.06gb"},
    timeout=30,
    description="AppWorld: apps and their APIs, used by code",
)
class APPWorldSandbox(TrainingSandbox):
    """AppWorld. It runs the agent's code: in a container, or here where ROLLOUT_UNSAFE_LOCAL=1 accepts that."""


@SandboxRegistry.register(
    f"agentscope/runtime-sandbox-bfcl:{get_image_tag()}",
    sandbox_type=SandboxType.BFCL,
    runtime_config={"shm_size": "8.06gb"},
    timeout=30,
    description="BFCL: function calling, in one turn and in many",
)
class BFCLSandbox(TrainingSandbox):
    """BFCL. DATASET_SUB_TYPE chooses the part of it that `train` and `val` are sides of."""


@SandboxRegistry.register(
    f"agentscope/runtime-sandbox-webshop:{get_image_tag()}",
    sandbox_type=SandboxType.WEBSHOP,
    runtime_config={"shm_size": "5.06gb"},
    timeout=30,
    description="WebShop: a shop with a search engine",
)
class WebShopSandbox(TrainingSandbox):
    """WebShop."""

"""The policy that asks a model: any endpoint that speaks OpenAI's chat completions.

The action is the model's message reduced to role, content and tool calls, as bytes; the same bytes go into the next
request. What a call cost and how it was sampled is recorded beside it. The seed sent with a request follows from
(episode seed, turn), so a resumed episode asks the same again.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from orchestrator.errors import UsageError
from orchestrator.seeds import derive
from orchestrator.types import Decision, Generation
from policies.agents.backoff import Backoff
from policies.agents.client import ModelClient
from policies.agents.completions import Dialect, Requests
from policies.agents.connection import ConnectionOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from orchestrator.protocols import EpisodeContext
    from orchestrator.records import ConversationView
    from policies.agents.client import Answered

_SEEDS: Final = 1 << 31
"""Request seeds stay below this: some servers read them as a signed 32-bit number."""


class ChatStatistics(NamedTuple):
    """Counts since the start; `in_flight` is now."""

    decisions: int
    calls: int
    retries: int
    failures: int
    in_flight: int
    prompt_tokens: int
    completion_tokens: int


class ChatPolicy:
    """Asks `model` at `base_url` (`http://HOST:PORT/v1`, or `unix:/path/to.sock`). An async context manager.

    Sampling: `temperature`, `top_p`, `max_tokens` are sent unless None; `send_seed` sends a seed a request; `extra`
    holds further fields of the request. `timeout_s` bounds one request, `connect_timeout_s` its connection, both in
    seconds; busy, broken and silent servers are asked again up to `max_retries` times. `max_connections` bounds the
    requests in flight (0: no bound). `api_key_env` names the environment variable with the key. `dialect` is `openai`
    or `tool_call` (tools in the system message, calls as text). `keep_reasoning` leaves a model's reasoning in the
    messages that it is sent again. `backoff` replaces the delays; `sleep`, `clock` and `rng` are for tests.
    Raises UsageError where an argument makes no sense.
    """

    name = "chat"
    needs_solutions = False
    calls_model = True

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        temperature: float | None = 1.0,
        top_p: float | None = None,
        max_tokens: int | None = None,
        send_seed: bool = True,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 10.0,
        max_retries: int = 5,
        max_connections: int = 0,
        max_reply_bytes: int = 16 * 1024 * 1024,
        dialect: str = "openai",
        keep_reasoning: bool = False,
        trust_env: bool = False,
        extra: Mapping[str, object] | None = None,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.perf_counter,
        rng: Callable[[], float] = random.random,
    ) -> None:
        given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        self.model = model
        self.base_url = base_url
        self.sampling: dict[str, object] = {name: value for name, value in given.items() if value is not None}
        self.sampling.update(extra or {})
        if not model:
            raise UsageError("name the model to ask, as the endpoint knows it")
        if temperature is not None and temperature < 0:
            raise UsageError(f"temperature is {temperature}; it is at least 0")
        if dialect not in list(Dialect):
            raise UsageError(f"unknown dialect {dialect!r}; known: {', '.join(Dialect)}")
        options = ConnectionOptions(
            base_url=base_url,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
            max_reply_bytes=max_reply_bytes,
            trust_env=trust_env,
        )
        self._send_seed = send_seed
        self._requests = Requests(model, self.sampling, Dialect(dialect))
        self._client = ModelClient(
            options,
            backoff or Backoff(max_retries=max_retries),
            keep_reasoning=keep_reasoning,
            sleep=sleep,
            clock=clock,
            rng=rng,
        )
        self._decisions = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    async def __aenter__(self) -> ChatPolicy:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.__aexit__(*exc)

    def __repr__(self) -> str:
        return f"ChatPolicy(model={self.model!r}, base_url={self.base_url!r})"

    def start(self, ctx: EpisodeContext) -> ChatAgent:
        """An agent for one attempt."""
        return ChatAgent(self, ctx.seed)

    def statistics(self) -> ChatStatistics:
        """Counts so far."""
        counts = self._client.counts
        return ChatStatistics(
            self._decisions,
            counts.calls,
            counts.retries,
            counts.failures,
            counts.in_flight,
            self._prompt_tokens,
            self._completion_tokens,
        )

    async def decide(self, view: ConversationView, seed: int) -> Decision:
        """Ask for the next message of a conversation. Raises and is cancelled as `ModelClient.complete`."""
        request_seed = derive("request", seed, view.turn) % _SEEDS if self._send_seed else None
        answered = await self._client.complete(self._requests.body(view, request_seed))
        generation = self._generation(answered, request_seed)
        self._decisions += 1
        self._prompt_tokens += generation.prompt_tokens
        self._completion_tokens += generation.completion_tokens
        return Decision(answered.completion.action, generation)

    def _generation(self, answered: Answered, seed: int | None) -> Generation:
        completion = answered.completion
        return Generation(
            model=completion.model or self.model,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            latency_s=answered.latency_s,
            finish_reason=completion.finish_reason,
            sampling=self.sampling if seed is None else {**self.sampling, "seed": seed},
            calls=answered.calls,
        )


class ChatAgent:
    """Asks the model for one episode."""

    __slots__ = ("_policy", "_seed")

    def __init__(self, policy: ChatPolicy, seed: int) -> None:
        self._policy = policy
        self._seed = seed

    async def act(self, view: ConversationView) -> Decision:
        """The model's next message. Raises PolicyError; cancelled: the request's connection is closed."""
        return await self._policy.decide(view, self._seed)

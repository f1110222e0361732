"""The HTTP side of a model call: one aiohttp session, finite deadlines, retries.

A call ends in a completion or in a PolicyError; what may pass (busy, broken or silent servers) is asked again, what
may not (a bad request, a wrong key) is raised at once. No error is raised while one of aiohttp's, which hold request
headers and so the key, is being handled.
"""

from __future__ import annotations

import asyncio
import io
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import aiohttp

from orchestrator.errors import PolicyError, UsageError
from orchestrator.types import Failure, FailureKind
from policies.agents.backoff import read_retry_after
from policies.agents.completions import MAX_SAID, BadReply, Completion, error_message, read_completion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from policies.agents.backoff import Backoff
    from policies.agents.connection import ConnectionOptions

RETRIED: Final = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may pass by themselves."""
MAX_MESSAGE: Final = 500
"""Characters quoted of what a server says."""
_LARGE_BODY: Final = 1024 * 1024
"""aiohttp writes bytes up to this in one go and warns above it; larger bodies are handed over as a stream."""
_HINTS: Final = {
    401: "put a valid key into the environment variable {key}",
    403: "put a key with access into the environment variable {key}",
    404: "check the base URL (it usually ends in /v1) and the model's name",
}


class Answered(NamedTuple):
    """A completion; `latency_s` is the answered request's own time, `calls` counts all that were sent."""

    completion: Completion
    latency_s: float
    calls: int


class _Failed(NamedTuple):
    message: str
    retry: bool = True
    retry_after_s: float | None = None


@dataclass(slots=True)
class ClientCounts:
    """What the client has done so far."""

    calls: int = 0
    retries: int = 0
    failures: int = 0
    in_flight: int = 0


class ModelClient:
    """Posts request bodies to one endpoint. An async context manager; safe to share by any number of tasks."""

    def __init__(
        self,
        options: ConnectionOptions,
        backoff: Backoff,
        *,
        keep_reasoning: bool = False,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.perf_counter,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.counts = ClientCounts()
        self._options = options
        self._backoff = backoff
        self._url, _ = options.target()
        self._keep_reasoning = keep_reasoning
        bound = options.max_connections
        self._places: AbstractAsyncContextManager[None] = asyncio.Semaphore(bound) if bound else nullcontext()
        self._sleep = sleep
        self._clock = clock
        self._rng = rng
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ModelClient:
        if self._session is not None:
            raise UsageError("the policy is in use already; make one for each run")
        self._session = self._options.session()
        return self

    async def __aexit__(self, *exc: object) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def complete(self, body: bytes) -> Answered:
        """Post a request until it is answered.

        Raises PolicyError: kind `policy` where the server refuses the request, `model_unavailable` where the retries
        are used up. Cancelled: the request's connection is closed.
        """
        failed = _Failed("no call was made")
        retries = self._backoff.max_retries
        for retry in range(retries + 1):
            if retry:
                self.counts.retries += 1
                await self._sleep(self._backoff.delay(retry - 1, self._rng(), failed.retry_after_s))
            async with self._places:
                started = self._clock()
                outcome = await self._send(body)
                latency_s = self._clock() - started
            if isinstance(outcome, Completion):
                return Answered(outcome, latency_s, retry + 1)
            failed = outcome
            if not failed.retry:
                break
        self.counts.failures += 1
        raise PolicyError(self._failure(failed))

    def _failure(self, failed: _Failed) -> Failure:
        if not failed.retry:
            return Failure(FailureKind.POLICY, "act", failed.message)
        message = (
            f"{self._options.base_url} gave no answer after {self._backoff.max_retries} retries; the last failure: "
            f"{failed.message}. Check that the model server is up and not overloaded, or allow more retries or time"
        )
        return Failure(FailureKind.MODEL_UNAVAILABLE, "act", message)

    async def _send(self, body: bytes) -> Completion | _Failed:
        session = self._session
        if session is None:
            raise UsageError("the policy is not open: use it inside `async with`")
        counts = self.counts
        counts.calls += 1
        counts.in_flight += 1
        data = body if len(body) <= _LARGE_BODY else io.BytesIO(body)
        try:
            async with session.post(self._url, data=data, allow_redirects=False) as response:
                if response.status == 200:
                    return self._completion(await _read(response, self._options.max_reply_bytes))
                return await self._refused(response)
        except BadReply as error:
            return _Failed(self._quoted(str(error)))
        except TimeoutError as error:
            return _Failed(f"no answer within {self._options.timeout_s:g} s ({type(error).__name__})")
        except (aiohttp.ClientError, OSError) as error:
            return _Failed(self._quoted(f"{type(error).__name__}: {error}"))
        finally:
            counts.in_flight -= 1

    def _completion(self, reply: bytes) -> Completion:
        cap = self._options.max_reply_bytes
        if len(reply) > cap:
            raise BadReply(f"the reply is larger than {cap} bytes")
        return read_completion(reply, keep_reasoning=self._keep_reasoning)

    async def _refused(self, response: aiohttp.ClientResponse) -> _Failed:
        status = response.status
        said = error_message(await _read(response, MAX_SAID))
        message = f"the model endpoint answered {status}: {self._quoted(said)}"
        if status in RETRIED or status >= 500:
            return _Failed(message, True, read_retry_after(response.headers.get("Retry-After"), time.time()))
        if 300 <= status < 400:
            target = self._quoted(response.headers.get("Location", "nowhere"))
            message = f"the model endpoint redirects ({status}) to {target}; give that address as base URL"
        hint = _HINTS.get(status)
        key = self._options.api_key_env or "named by api_key_env"
        return _Failed(f"{message}; {hint.format(key=key)}" if hint else message, False)

    def _quoted(self, said: str) -> str:
        said = self._options.redacted(said)
        return said if len(said) <= MAX_MESSAGE else f"{said[:MAX_MESSAGE]}..."


async def _read(response: aiohttp.ClientResponse, cap: int) -> bytes:
    """The whole body, or its beginning: longer than `cap` where there is more."""
    length = response.content_length
    if length is not None and length <= cap:
        return await response.read()
    chunks: list[bytes] = []
    size = 0
    while size <= cap and (chunk := await response.content.readany()):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)

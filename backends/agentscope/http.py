"""Requests to a server of AgentScope's protocols: JSON objects both ways, every failure in our own words.

Owns one connection pool, made with the first request. Always true: a request is sent once; an answer is bounded in
size and is an object; an answer that says no is a `UsageError` where the caller can mend it, `Unavailable` where
waiting may, and a `SandboxError` else. A traceback in an answer is cut to its last line.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import aiohttp
import orjson

from orchestrator.errors import RolloutError, SandboxError, Unavailable, UsageError
from orchestrator.types import Failure, FailureKind

MAX_ANSWER: Final = 64 * 1024 * 1024
MESSAGE_CAP: Final = 500
"""Characters of a server's words that are kept."""
KEEP_S: Final = 4.0
"""How long a connection is kept for the next call: less than the 5 s after which an original closes it, for a call that
meets the closing may have run, and loses its instance."""
_CHUNK: Final = 64 * 1024
_FORWARDED: Final = re.compile(r"HTTP Error (4\d\d)\b")
"""How a manager passes on that its environment service refused a call."""
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


class NoRoute(UsageError):
    """The server does not have this route."""


class Unprocessable(UsageError):
    """The server understood the call, and cannot do it: what it asks for ends the sandbox (422)."""


class Busy(Unavailable):
    """The server took nothing on: it has no room now. `after_s` is when it wants to be asked again, None where it does
    not say."""

    def __init__(self, message: str, after_s: float | None) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unreachable(SandboxError):
    """Nothing was sent: no connection to the server could be made."""


class Channel:
    """Posts to one server. `timeout` is in seconds, for a whole request; `socket` is the path of a unix socket that it
    listens on, and then `base_url` is only what it is called."""

    def __init__(self, base_url: str, *, token: str | None, timeout: float, socket: str | None = None) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"base_url must begin with http:// or https://, not {base_url!r}")
        self.base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self.socket = socket
        self._session: aiohttp.ClientSession | None = None

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST. Raises NoRoute, UsageError, Unavailable, SandboxError. Cancelled: it may have run."""
        try:
            data = orjson.dumps(body)
        except TypeError as error:
            raise UsageError(f"the arguments of {route} must be JSON: {error}") from None
        try:
            async with self._connected().post(f"{self.base_url}/{route}", data=data) as response:
                answer = await _read(response)
                if response.status != 200:
                    raise self._refusal(route, response, answer)
        except TimeoutError:
            message = f"{self.base_url} did not answer {route} within {self._timeout.total:g} s"
            raise SandboxError(Failure(FailureKind.SANDBOX_HUNG, route, message)) from None
        except aiohttp.ClientConnectorError as error:
            raise Unreachable(_lost(route, f"{self.base_url} cannot be reached: {error}")) from None
        except aiohttp.ClientError as error:
            message = f"{self.base_url} broke off: {str(error) or type(error).__name__}"
            raise SandboxError(_lost(route, message)) from None
        try:
            value = orjson.loads(answer)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            message = f"{self.base_url} answered {route} with what is not a JSON object; is it a server of sandboxes?"
            raise SandboxError(Failure(FailureKind.PROTOCOL, route, message))
        return value

    async def alive(self, within_s: float) -> bool:
        """Whether the server says that it is well, within so many seconds."""
        limit = aiohttp.ClientTimeout(total=within_s)
        try:
            async with self._connected().get(f"{self.base_url}/healthz", timeout=limit) as response:
                return response.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return False

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector  # without a bound: whoever calls bounds what is under way
            if self.socket:
                connector = aiohttp.UnixConnector(self.socket, limit=0, keepalive_timeout=KEEP_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_S)
            self._session = aiohttp.ClientSession(timeout=self._timeout, headers=self._headers, connector=connector)
        return self._session

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _refusal(self, route: str, response: aiohttp.ClientResponse, answer: bytes) -> RolloutError:
        status, words = response.status, _detail(answer)
        if status in (401, 403):
            return UsageError(f"{self.base_url} wants another bearer_token: {words or status}")
        if status in (404, 405) and words in ("Not Found", "Method Not Allowed", ""):
            return NoRoute(f"{self.base_url} has no route /{route}")
        if status in (429, 503):
            after_s = _seconds(response.headers.get("Retry-After"))
            hint = "; try again later" if after_s is None else f"; try again in {after_s:g} s"
            return Busy(f"{self.base_url} is busy: {words or status}{hint}", after_s)
        if status == 422:
            return Unprocessable(f"{route}: {words or status}")
        if 400 <= status < 500 or _FORWARDED.search(words):
            return UsageError(f"{route}: {words or status}")
        return SandboxError(Failure(FailureKind.ENVIRONMENT, route, f"{self.base_url} failed: {words or status}"))


def _seconds(after: str | None) -> float | None:
    """What a Retry-After header says: seconds, or a date."""
    if after is None:
        return None
    if after.strip().isdecimal():
        return float(after)
    try:
        return max((parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _lost(route: str, message: str) -> Failure:
    return Failure(FailureKind.SANDBOX_LOST, route, message, retryable=True)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER:
            message = f"an answer is over the cap of {MAX_ANSWER} bytes"
            raise SandboxError(Failure(FailureKind.PROTOCOL, "call", message))
    return b"".join(parts)


def _detail(answer: bytes) -> str:
    """What an error's body says, in one line."""
    try:
        value = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return ""
    detail = value.get("detail") if isinstance(value, dict) else None
    text = detail if isinstance(detail, str) else "" if detail is None else orjson.dumps(detail).decode()
    lines = [line for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    if not lines:
        return ""
    first = lines[0] if "Traceback" not in text and "ray::" not in text else lines[-1]
    return first.strip()[:MESSAGE_CAP]

"""Where a model endpoint is and how it is reached: URL or unix socket, deadlines, bounds, the API key.

The key's value is read from the environment where it is needed and kept nowhere else than in the headers of an open
session; options hold the variable's name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

import aiohttp
from yarl import URL

from orchestrator.errors import UsageError

_KEEPALIVE_S: Final = 4.0
"""Common servers close an idle connection after 5 s; reusing it just then would lose a request."""
_DNS_TTL_S: Final = 300


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to reach an endpoint. Times are seconds. Raises UsageError where a value makes no sense."""

    base_url: str
    """`http(s)://HOST[:PORT]/v1`, or `unix:/path/to.sock` for a server that listens there."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key; unset or None: no key is sent."""
    timeout_s: float = 120.0
    """Of one request, from sending to the last byte."""
    connect_timeout_s: float = 10.0
    max_connections: int = 0
    """Requests in flight at most, 0 for no bound; waiting for a place does not count against the timeout."""
    max_reply_bytes: int = 16 * 1024 * 1024
    trust_env: bool = False
    """Whether proxies named in the environment are used."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "connect_timeout_s", "max_reply_bytes"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}; it must be finite and greater than 0")
        if self.max_connections < 0:
            raise UsageError(f"max_connections is {self.max_connections}; give 0 for no bound, or a positive number")
        self.target()

    def target(self) -> tuple[URL, str | None]:
        """The URL to post to, and the unix socket to do it through."""
        if self.base_url.startswith("unix:/"):
            return URL("http://localhost/v1/chat/completions"), self.base_url.removeprefix("unix:")
        try:
            url = URL(self.base_url)
        except ValueError:
            url = URL()
        if url.user or url.password or url.query_string or url.fragment:
            raise UsageError("the base URL may hold no user, password, query or fragment; the key comes by api_key_env")
        if url.scheme not in {"http", "https"} or not url.host:
            known = "http://127.0.0.1:8000/v1 or unix:/path/to.sock"
            raise UsageError(f"the base URL must be like {known}; it is {self.base_url!r:.200}")
        return url / "chat/completions", None

    def session(self) -> aiohttp.ClientSession:
        """A session with these deadlines and the key in its headers. Raises UsageError if the key cannot be sent."""
        _, socket = self.target()
        connector: aiohttp.BaseConnector
        if socket is not None:
            connector = aiohttp.UnixConnector(socket, limit=0, keepalive_timeout=_KEEPALIVE_S)
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, ttl_dns_cache=_DNS_TTL_S)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=self.connect_timeout_s),
            headers=self._headers(),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=self.trust_env,
        )

    def redacted(self, text: str) -> str:
        """The text without the key."""
        key = self._key()
        return text.replace(key, "[key]") if key else text

    def _key(self) -> str | None:
        return os.environ.get(self.api_key_env) if self.api_key_env else None

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # the cap on a reply holds for what is read: nothing may unpack later
            "User-Agent": "rollout-orchestrator",
        }
        key = self._key()
        if key:
            if not (key.isascii() and key.isprintable()):
                raise UsageError(
                    f"the environment variable {self.api_key_env} has characters that no key has "
                    "(a line break, perhaps); set it again"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

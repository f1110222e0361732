"""Sandboxes on a server that somebody else runs: our own (over its wire) or AgentScope's (plain HTTP)."""

from backends.sandboxes.remote.backend import RemoteBackend

__all__ = ["RemoteBackend"]

"""Whom a client of the orchestrator's trusts: one certificate, and no authority."""

from __future__ import annotations

import ssl


def trusted(certificate: str | None) -> ssl.SSLContext | bool:
    """Trust the orchestrator's own certificate and nothing else; its address says nothing."""
    if certificate is None:
        return True
    context = ssl.create_default_context(cadata=certificate)
    context.check_hostname = False
    return context

"""What environments read of an agent's message in the same way."""

from __future__ import annotations


def text_of(content: object) -> str | None:
    """The text of an OpenAI `content` field: a string, a list of text parts, or null for ""; None for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return None

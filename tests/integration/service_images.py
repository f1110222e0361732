"""Images that serve AgentScope's protocol, built on this machine's base image for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from backends.sandboxes.docker.base import add_bytes
from backends.sandboxes.docker.images import base_image
from backends.sandboxes.docker.port import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping

COUNTING = "rollout-test-counting:latest"


async def build(tag: str, files: Mapping[str, bytes], command: list[str]) -> str:
    """An image of the base with some files in it, which runs `command`."""
    async with await Engine.connect() as engine:
        base = await base_image(engine, lambda step: None)
        lines = [f"FROM {base}", *(f"COPY {name} /{name}" for name in files)]
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w", format=tarfile.GNU_FORMAT) as tar:
            add_bytes(tar, "Dockerfile", "\n".join([*lines, f"CMD {orjson.dumps(command).decode()}\n"]).encode())
            for name, content in files.items():
                add_bytes(tar, name, content)
        context.seek(0)
        await engine.build(context, lambda step: None, tag=tag, labels={}, arguments={})
    return tag


async def counting() -> str:
    """An image of the service that counts."""
    source = Path(__file__).with_name("counting_service.py").read_bytes()
    return await build(COUNTING, {"counting_service.py": source}, ["python3", "/counting_service.py", "80"])


def count_to(total: int, length: int = 6) -> list[bytes]:
    """Actions that bring a count of `length` messages to a total."""
    numbers = [total - length + 1, *([1] * (length - 1))]
    return [orjson.dumps({"role": "assistant", "content": f"add {number}"}) for number in numbers]

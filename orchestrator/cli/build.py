"""The one place that turns a configuration into objects; nothing below it sees options, files or variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from backends.environments.catalog import find
from orchestrator.cli.config import Chat, Docker, Local, Ray, Remote, Replay, RunConfig, Scripted
from orchestrator.cli.solutions import REFERENCE, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backends.environments.catalog import EnvironmentSpec
    from orchestrator.events import Listener
    from orchestrator.facade import Orchestrator
    from orchestrator.protocols import Backend, Policy
    from orchestrator.shards import Shards


def orchestrator(config: RunConfig, out: Path, *, resume: bool, listener: Listener) -> Orchestrator:
    """An orchestrator, not yet entered. Raises UsageError, UnknownName, Unavailable."""
    from orchestrator import Orchestrator

    return Orchestrator(
        backend=backend(config),
        policy=policy(config),
        out=out,
        concurrency=config.concurrency,
        sandboxes=_sandboxes(config),
        seed=config.seed,
        durability=config.durability,
        options=config.env_option,
        max_turns=config.max_turns,
        step_timeout_s=config.step_timeout,
        episode_timeout_s=config.episode_timeout,
        on_agent_kill=config.on_agent_kill,
        consumer=config.consumer,
        max_unacked=config.max_unacked,
        resume=resume,
        listener=listener,
        shards=shards(config),
        config=config.model_dump(mode="json"),
    )


def backend(config: RunConfig) -> Backend:
    """Where sandboxes run."""
    match config.backend:
        case Local(unsafe_local=unsafe):
            from backends.sandboxes.local import LocalBackend

            return LocalBackend(config.env, unsafe=unsafe, auto_install=False)
        case Docker(image_protocol="env_service", image=str(image)) as docker:
            from backends.sandboxes.docker.service_backend import ServiceImageBackend
            from backends.sandboxes.docker.service_image import ServiceImage

            return ServiceImageBackend(
                config.env,
                ServiceImage(image, variables=docker.image_env, hardening=docker.hardening),
                max_instances=docker.max_instances,
                solutions=_solutions(docker.solutions),
            )
        case Docker(image=image, hardening=hardening):
            from backends.sandboxes.docker import DockerBackend

            host, port = _address(config.listen or "")
            return DockerBackend(
                config.env, image=image, hardening=hardening, host=host or None, port=port, insecure=config.insecure
            )
        case Remote(url=url, token_env=token_env, max_instances=max_instances, solutions=solutions):
            from backends.sandboxes.remote import RemoteBackend

            token = os.environ.get(token_env)
            return RemoteBackend(
                url,
                environment=config.env,
                token=token,
                max_instances=max_instances,
                solutions=_solutions(solutions),
            )
        case Ray():
            from backends.sandboxes.ray import RayBackend

            return RayBackend(config.env, **_cluster(config))
        case other:
            assert_never(other)


def _sandboxes(config: RunConfig) -> int | None:
    """One container of somebody else's service, unless more are asked for: it starts a process for each instance."""
    own = config.backend
    return config.sandboxes or (1 if isinstance(own, Docker) and own.image_protocol == "env_service" else None)


def _solutions(source: str | None) -> Mapping[str, Sequence[bytes]] | None:
    return None if source is None else read(source)


def shards(config: RunConfig) -> Shards | None:
    """Where the episodes are played, if not in this process."""
    if config.shards is None:
        return None
    from backends.sandboxes.ray import RayShards

    return RayShards(config.shards, **_cluster(config))


def _cluster(config: RunConfig) -> dict[str, Any]:
    """The cluster, and how it reaches this machine."""
    from backends.sandboxes.ray import RayOptions

    host, port = _address(config.listen or "")
    options = RayOptions(
        cpus=config.ray_cpus,
        memory_mb=config.ray_memory_mb,
        strategy=config.ray_strategy,
        node_labels=config.ray_label,
        runtime_env=config.ray_runtime_env,
    )
    return {
        "address": config.ray_address,
        "options": options,
        "host": host or None,
        "port": port,
        "insecure": config.insecure,
    }


def _address(text: str) -> tuple[str, int]:
    """`HOST`, `HOST:PORT`, `[HOST]` or `[HOST]:PORT`; "" and 0 for what is not said."""
    host, _, port = text.rpartition(":")
    if not host or text.endswith("]"):
        host, port = text, "0"
    return host.strip("[]"), int(port)


def policy(config: RunConfig) -> Policy:
    """Who acts."""
    match config.policy:
        case Replay(skill=skill):
            from policies.agents.replay import ReplayPolicy

            return ReplayPolicy(skill=skill)
        case Scripted(script=script):
            from policies.agents.scripted import ScriptedPolicy

            return ScriptedPolicy.from_file(script)
        case Chat() as chat:
            return _chat(chat)
        case other:
            assert_never(other)


def _chat(chat: Chat) -> Policy:
    from policies.agents.chat import ChatPolicy

    return ChatPolicy(
        chat.model,
        chat.base_url,
        api_key_env=chat.api_key_env,
        temperature=chat.temperature,
        top_p=chat.top_p,
        max_tokens=chat.max_tokens,
        timeout_s=chat.model_timeout,
        max_retries=chat.model_retries,
        dialect=chat.dialect,
        send_seed=chat.send_seed,
        keep_reasoning=chat.keep_reasoning,
        trust_env=chat.trust_env,
        extra=chat.extra,
    )


async def ensure_ready(config: RunConfig, *, install: bool) -> None:
    """Install an environment, or build its image, at its first use, saying so. Raises Unavailable, EngineError."""
    match config.backend:
        case Docker(image_protocol="rollout", image=image):
            await ensure_image(find(config.env), image, build=install)
        case Docker(image=image, solutions=solutions):
            assert image is not None, "checked with the configuration"
            await _ensure_solutions(config, solutions, install=install)
            await _ensure_service_image(image, pull=install)
        case Remote(solutions=solutions):
            await _ensure_solutions(config, solutions, install=install)
        case Local() | Ray():
            await ensure_installed(find(config.env), install=install)
        case other:
            assert_never(other)


async def _ensure_solutions(config: RunConfig, source: str | None, *, install: bool) -> None:
    """Somebody else serves the environment: this machine needs it, or the published service, for `replay` alone."""
    from orchestrator.cli.output import say

    if source == REFERENCE and install:
        from bench.reference import reference

        await reference(say)
    elif source is None and isinstance(config.policy, Replay):
        await ensure_installed(find(config.env), install=install)


async def ensure_installed(spec: EnvironmentSpec, *, install: bool) -> None:
    """Install an environment at its first use, saying so; with `install` False raises Unavailable instead."""
    from backends.environments.install import install as install_environment
    from orchestrator.cli.output import say

    if not spec.installed and install:
        await install_environment(spec, progress=say)
    spec.interpreter()


async def ensure_image(spec: EnvironmentSpec, image: str | None, *, build: bool) -> None:
    """Find, pull or build an environment's image, saying so; with `build` False raises Unavailable instead of building.

    Raises EngineError too.
    """
    from backends.sandboxes.docker.images import ensure
    from backends.sandboxes.docker.port import Engine
    from orchestrator.cli.steps import steps_shown

    async with await Engine.connect() as engine:
        with steps_shown(f"image of {spec.name}") as progress:
            await ensure(engine, spec, image, progress, build_missing=build)


async def _ensure_service_image(image: str, *, pull: bool) -> None:
    """Find or pull somebody else's image, saying so; with `pull` False raises Unavailable instead of pulling."""
    from backends.sandboxes.docker.images import base_image, found_or_pulled
    from backends.sandboxes.docker.port import Engine
    from orchestrator.cli.steps import steps_shown

    async with await Engine.connect() as engine:
        with steps_shown(f"image {image}") as progress:
            await found_or_pulled(engine, image, progress, pull_missing=pull)
            await base_image(engine, progress)


def absolute(config: RunConfig) -> RunConfig:
    """The same configuration, valid in any working directory: what is stored with the run."""
    if isinstance(config.policy, Scripted):
        file, _, function = config.policy.script.rpartition(":")
        script = f"{Path(os.path.abspath(file))}:{function}"
        config = config.model_copy(update={"policy": config.policy.model_copy(update={"script": script})})
    if isinstance(config.backend, Docker | Remote) and config.backend.solutions not in {None, REFERENCE}:
        solutions = os.path.abspath(str(config.backend.solutions))
        config = config.model_copy(update={"backend": config.backend.model_copy(update={"solutions": solutions})})
    return config

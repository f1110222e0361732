"""`rollout collect`: start a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from orchestrator.cli import options
from orchestrator.cli.options import HOW, OUTPUT, WHAT, WHO


def _option(panel: str, metavar: str | None, help_: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help_, rich_help_panel=panel)


Text = str | None
Count = int | None
Number = float | None


def collect(
    ctx: typer.Context,
    env: Annotated[Text, _option(WHAT, "NAME", "The environment; see `rollout env list`.")] = None,
    split: Annotated[Text, _option(WHAT, "NAME", "A split, or its part NAME:train or NAME:val.")] = None,
    task_id: Annotated[list[str] | None, _option(WHAT, "ID", "Only this task; may be repeated.")] = None,
    env_option: Annotated[
        list[str] | None,
        _option(WHAT, "KEY=VALUE", "An option of the environment, as in actions=true; may be repeated."),
    ] = None,
    group_size: Annotated[Count, _option(WHAT, "N", "Samples of each task, released together (default 1).")] = None,
    episodes: Annotated[Count, _option(WHAT, "N", "Episodes in all (default: one group of each task).")] = None,
    seed: Annotated[Count, _option(WHAT, "N", "Decides every random choice (default 0).")] = None,
    config: Annotated[
        Path | None, _option(WHAT, "FILE", "A YAML file of options; the command line overrides it.")
    ] = None,
    policy: Annotated[Text, _option(WHO, "NAME", "replay, scripted or chat (default replay).")] = None,
    skill: Annotated[Number, _option(WHO, "0..1", "replay: the share of right calls (default 1).")] = None,
    script: Annotated[Text, _option(WHO, "FILE.py:FUNC", "scripted: your function.")] = None,
    model: Annotated[Text, _option(WHO, "NAME", "chat: the model.")] = None,
    base_url: options.BaseUrl = None,
    api_key_env: Annotated[Text, _option(WHO, "NAME", "chat: the variable with the key (OPENAI_API_KEY).")] = None,
    temperature: Annotated[Number, _option(WHO, "X", "chat: sampling.")] = None,
    top_p: Annotated[Number, _option(WHO, "X", "chat: sampling.")] = None,
    max_tokens: Annotated[Count, _option(WHO, "N", "chat: a bound on each answer.")] = None,
    model_timeout: Annotated[Number, _option(WHO, "S", "chat: seconds a call (default 120).")] = None,
    model_retries: Annotated[Count, _option(WHO, "N", "chat: retries a call (default 5).")] = None,
    dialect: Annotated[
        Literal["openai", "tool_call"] | None, _option(WHO, None, "chat: how tool calls are written.")
    ] = None,
    max_turns: Annotated[Count, _option(HOW, "N", "Actions an episode (default: the environment's).")] = None,
    concurrency: options.Concurrency = None,
    sandboxes: options.Sandboxes = None,
    backend: Annotated[
        Text, _option(HOW, "NAME", "Where sandboxes run: local, docker, ray or remote (default local).")
    ] = None,
    unsafe_local: Annotated[
        bool | None, _option(HOW, None, "local: allow environments that run the agent's code.", "--unsafe-local")
    ] = None,
    image: Annotated[Text, _option(HOW, "IMAGE", "docker: an image of your own (default: built).")] = None,
    image_protocol: Annotated[
        Literal["rollout", "env_service"] | None,
        _option(HOW, None, "docker: what the image speaks: our wire, or AgentScope's env_service (default rollout)."),
    ] = None,
    image_env: Annotated[
        list[str] | None, _option(HOW, "NAME=VALUE", "env_service: a variable of the image; may be repeated.")
    ] = None,
    hardening: Annotated[
        list[str] | None,
        _option(HOW, "ITEM=VALUE", "docker: switch one item, as in memory_mb=4096; may be repeated."),
    ] = None,
    url: Annotated[Text, _option(HOW, "URL", "remote: the server.")] = None,
    token_env: Annotated[Text, _option(HOW, "NAME", "remote: the variable with its token (ROLLOUT_TOKEN).")] = None,
    max_instances: Annotated[Count, _option(HOW, "N", "remote, env_service: instances at once (default 16).")] = None,
    solutions: Annotated[
        Text,
        _option(
            HOW,
            "FILE|reference",
            "remote, env_service: what replay plays, where the server's data is another release's.",
        ),
    ] = None,
    shards: options.Shards = None,
    ray_address: options.RayAddress = None,
    ray_cpus: Annotated[Number, _option(HOW, "N", "ray, shards: CPUs that one is counted as (default 1).")] = None,
    ray_memory_mb: Annotated[Count, _option(HOW, "MIB", "ray: memory that one is counted as.")] = None,
    ray_strategy: Annotated[
        Literal["spread", "pack"] | None, _option(HOW, None, "ray: over the nodes, or on few of them.")
    ] = None,
    ray_label: Annotated[
        list[str] | None, _option(HOW, "KEY=VALUE", "ray: a label its node must have; may be repeated.")
    ] = None,
    ray_runtime_env: Annotated[
        list[str] | None, _option(HOW, "KEY=JSON", "ray: how nodes come by this package; may be repeated.")
    ] = None,
    listen: options.Listen = None,
    insecure: Annotated[
        bool | None, _option(HOW, None, "ray, shards, docker over TCP: without TLS.", "--insecure")
    ] = None,
    step_timeout: Annotated[Number, _option(HOW, "S", "Seconds a step (default 30).")] = None,
    episode_timeout: Annotated[Number, _option(HOW, "S", "Seconds an episode (default: no bound).")] = None,
    durability: Annotated[
        Literal["auto", "step", "episode"] | None,
        _option(HOW, None, "What survives a crash: each step or whole episodes (auto: step if a model is called)."),
    ] = None,
    on_agent_kill: Annotated[
        Literal["zero", "grade", "drop"] | None,
        _option(HOW, None, "The reward of an action that kills its sandbox twice (default zero)."),
    ] = None,
    no_install: options.NoInstall = False,
    consumer: Annotated[Text, _option(HOW, "NAME", "Pause while this consumer is too far behind.")] = None,
    max_unacked: Annotated[Count, _option(HOW, "N", "How many groups it may be behind.")] = None,
    out: Annotated[Path | None, _option(OUTPUT, "DIR", "The run's directory (default runs/ENV-TIME).")] = None,
    json: options.Json = False,
    log_level: options.LogLevel = None,
    verbose: options.Verbose = False,
) -> None:
    """Collect episodes into a new run directory.

    The first Ctrl-C drains: what runs is finished, nothing new begins. The second cancels. The third ends all at once.

    In any case, and after a crash too, `rollout resume DIR` goes on.
    """
    from orchestrator.cli.conduct import conduct
    from orchestrator.cli.config import load

    run = load(config, options.given(ctx))
    raise typer.Exit(conduct(run, resume=False, install=not no_install, json=json, verbose=verbose))

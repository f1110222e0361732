"""What a run is told: frozen models, filled from a YAML file and the command line, which overrides it.

A key of the file has the name of its option (`--step-timeout` is `step_timeout`). What belongs to a policy or a backend
stands under it in the file. A value that is refused is reported by the place it came from: `FILE:LINE: key` or
`--option`. The same models are stored with the run, so that `resume` needs nothing but the directory; they hold names
of secret variables, never their values.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path  # noqa: TC003  pydantic evaluates the annotation
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.service_image import OF_ORIGINALS
from orchestrator.cli.source import Source
from orchestrator.errors import UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Solutions = Annotated[str, Field(min_length=1)]
"""A file of them, or `reference`: those of the release that AgentScope's published service grades by."""


class Frozen(BaseModel):
    """Unknown keys are errors; nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Replay(Frozen):
    """Plays the known solution; a seeded fraction `1 - skill` of its calls is wrong."""

    kind: Literal["replay"]
    skill: float = Field(default=1.0, ge=0, le=1)


class Scripted(Frozen):
    """Your own function, `FILE.py:FUNCTION`."""

    kind: Literal["scripted"]
    script: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")


class Chat(Frozen):
    """An OpenAI-compatible endpoint. `api_key_env` names the variable that holds the key."""

    kind: Literal["chat"]
    model: str = Field(min_length=1)
    base_url: str = Field(pattern=r"^https?://[^/\s@]+(/\S*)?$")
    """Without a user or a password: it is stored with the run."""
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = Field(default=1.0, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: PositiveInt | None = None
    model_timeout: Seconds = 120.0
    model_retries: NonNegativeInt = 5
    dialect: Literal["openai", "tool_call"] = "openai"
    send_seed: bool = True
    keep_reasoning: bool = False
    trust_env: bool = False
    """Whether the proxy variables of the environment are obeyed."""
    extra: dict[str, Any] = {}
    """Further members of each request's body, as they are."""


class Local(Frozen):
    """Sandboxes as subprocesses on this machine."""

    kind: Literal["local"]
    unsafe_local: bool = False
    """Allow environments that run the agent's code, with nothing around them."""


def _read_options(value: object) -> object:
    """Options as the command line has them (`KEY=VALUE`, the value JSON, or else text), or a mapping."""
    if not isinstance(value, list | tuple):
        return value
    read: dict[str, object] = {}
    for word in value:
        key, sign, text = str(word).partition("=")
        if not (key and sign):
            raise ValueError(f"an option is KEY=VALUE, not {word!r}")
        try:
            read[key] = orjson.loads(text)
        except orjson.JSONDecodeError:
            read[key] = text
    return read


def _read_variables(value: object) -> object:
    """Variables as the command line has them (`NAME=VALUE`), or a mapping."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(word).partition("=") for word in value]
    if wrong := next((name for name, sign, _ in pairs if not (name and sign)), None):
        raise ValueError(f"a variable is NAME=VALUE, not {wrong!r}")
    return {name: text for name, _, text in pairs}


def _switched(value: object) -> object:
    """Items as the command line has them (`NAME=VALUE`), or as a mapping; `egress=none` allows no destination."""
    if isinstance(value, list | tuple):
        pairs = (str(word).partition("=") for word in value)
        value = {name: text or None for name, _, text in pairs}
    if isinstance(value, dict) and isinstance(places := value.get("egress"), str):
        value = value | {"egress": () if places == "none" else tuple(places.split(","))}
    known = [item.name for item in fields(Hardening)]
    if isinstance(value, dict) and (unexpected := sorted(value.keys() - set(known))):
        raise ValueError(f"there is no item {unexpected[0]!r}; the items are {', '.join(known)}")
    return value


class Docker(Frozen):
    """Sandboxes as containers of a Docker daemon: the one that the docker command would use."""

    kind: Literal["docker"]
    image: str | None = Field(default=None, min_length=1)
    """An image of your own; by default the environment's is built."""
    image_protocol: Literal["rollout", "env_service"] = "rollout"
    """What the image's server speaks: this project's wire, or AgentScope's environment service."""
    image_env: Annotated[dict[str, str], BeforeValidator(_read_variables)] = {}
    """env_service: the image's variables. They are stored with the run, so they are no place for secrets."""
    max_instances: PositiveInt = 16
    """env_service: instances at once."""
    solutions: Solutions | None = None
    """env_service: the known actions of its tasks; see `orchestrator.cli.solutions`."""
    hardening: Annotated[Hardening, BeforeValidator(_switched)] = Hardening()
    """What walls a container off, item by item."""

    @model_validator(mode="before")
    @classmethod
    def _of_originals(cls, values: Any) -> Any:
        """Items that were not given are those of such images."""
        if isinstance(values, dict) and values.get("image_protocol") == "env_service":
            given = _switched(values.get("hardening") or {})
            if isinstance(given, dict):
                return values | {"hardening": asdict(OF_ORIGINALS) | given}
        return values

    @model_validator(mode="after")
    def _meant(self) -> Self:
        """Refuse what would change nothing."""
        if self.image_protocol == "env_service":
            if self.image is None:
                raise ValueError("the protocol env_service is an image's: name it with --image")
            return self
        for name in ("image_env", "max_instances", "solutions"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to an image of the protocol env_service (--image-protocol)")
        return self


class Remote(Frozen):
    """Sandboxes on a server that is there already. `token_env` names the variable that holds its token."""

    kind: Literal["remote"]
    url: str = Field(pattern=r"^https?://[^/\s@]+(/\S*)?$")
    """Without a user or a password: it is stored with the run."""
    token_env: str = "ROLLOUT_TOKEN"
    max_instances: PositiveInt = 16
    solutions: Solutions | None = None
    """The known actions of its tasks, where it grades by other data than this machine's environment."""


class Ray(Frozen):
    """Sandboxes as actors of a Ray cluster, whose servers dial in here; the options `ray_*` say which and how."""

    kind: Literal["ray"]


def _none_of_zero(value: object) -> object:
    return None if value == 0 and not isinstance(value, bool) else value


def _named(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


class RunConfig(Frozen):
    """A run, whole: what `collect` is given and what is stored with it."""

    env: str
    split: str = ""
    task_id: tuple[str, ...] = ()
    env_option: Annotated[dict[str, Any], BeforeValidator(_read_options)] = {}
    """What episodes are opened with; each environment documents its own."""
    policy: Annotated[Replay | Scripted | Chat, Field(discriminator="kind"), BeforeValidator(_named)] = Replay(
        kind="replay"
    )
    backend: Annotated[Local | Docker | Remote | Ray, Field(discriminator="kind"), BeforeValidator(_named)] = Local(
        kind="local"
    )
    group_size: PositiveInt = 1
    episodes: PositiveInt | None = None
    shards: Annotated[PositiveInt | None, BeforeValidator(_none_of_zero)] = None
    """Orchestrators on a Ray cluster that play the episodes, each with sandboxes of its own."""
    ray_address: str | None = Field(default=None, min_length=1)
    """Of the cluster; by default RAY_ADDRESS, or one of this machine's own."""
    ray_cpus: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """CPUs that a sandbox is counted as."""
    ray_memory_mb: PositiveInt | None = None
    ray_strategy: Literal["spread", "pack"] = "spread"
    ray_label: Annotated[dict[str, str], BeforeValidator(_read_options)] = {}
    """Labels that a sandbox's node must have."""
    ray_runtime_env: Annotated[dict[str, Any], BeforeValidator(_read_options)] = {}
    """How nodes come by this package; see Ray's documentation."""
    listen: str | None = Field(default=None, pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s]+)(:\d+)?$")
    """The address, and the port, that the nodes, or the containers of another machine's daemon, reach this one at."""
    insecure: bool = False
    """Without TLS."""
    concurrency: PositiveInt = 256
    sandboxes: PositiveInt | None = None
    max_turns: PositiveInt | None = None
    step_timeout: Seconds = 30.0
    episode_timeout: Seconds | None = None
    seed: NonNegativeInt = Field(default=0, lt=2**63)
    durability: Literal["auto", "step", "episode"] = "auto"
    on_agent_kill: Literal["zero", "grade", "drop"] = "zero"
    consumer: str | None = Field(default=None, min_length=1)
    max_unacked: PositiveInt | None = None
    out: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"


POLICIES: Final[dict[str, type[Frozen]]] = {"replay": Replay, "scripted": Scripted, "chat": Chat}
BACKENDS: Final[dict[str, type[Frozen]]] = {"local": Local, "docker": Docker, "remote": Remote, "ray": Ray}
_TCP: Final = frozenset({"listen", "insecure"})
_RAY: Final = _TCP.union(name for name in RunConfig.model_fields if name.startswith("ray_"))
_PARTS: Final = {"policy": POLICIES, "backend": BACKENDS}


def load(path: Path | None, given: Mapping[str, object]) -> RunConfig:
    """The configuration of a file (or of none) with the options given on the command line over it.

    Raises UsageError with one line for each refused value, UnknownName for a policy or backend.
    """
    source = Source.read(path) if path else Source()
    for part, known in _PARTS.items():
        name = given.get(part)
        if isinstance(name, str) and name not in known:
            raise unknown(part, name, known)
    merged = _merge(source.values, given)
    try:
        return _consistent(RunConfig.model_validate(merged))
    except ValidationError as error:
        known_keys = {*RunConfig.model_fields, *(key for part in _PARTS for key in _keys(part))}
        raise UsageError("\n".join(source.explain(one, given, known_keys) for one in error.errors())) from None


def _consistent(config: RunConfig) -> RunConfig:
    """Refuse what would change nothing."""
    if config.split and config.task_id:
        raise UsageError("give --split or --task-id, not both: a task is taken from whichever split has it")
    _placed(config, config.model_fields_set)
    if config.max_unacked is not None and config.consumer is None:
        raise UsageError("--max-unacked says how far a consumer may be behind: name it with --consumer")
    return config


def _placed(config: RunConfig, names: Collection[str]) -> None:
    """Refuse two places at once, and, of the options in `names`, what is for a Ray cluster where none is used;
    containers of another machine's daemon dial in as a cluster's sandboxes do."""
    if config.shards is not None and not isinstance(config.backend, Local):
        raise UsageError(
            "--shards puts whole orchestrators with local sandboxes on the nodes: give --shards or "
            f"--backend {config.backend.kind}, not both"
        )
    if config.shards is not None or isinstance(config.backend, Ray):
        return
    docker = isinstance(config.backend, Docker) and config.backend.image_protocol == "rollout"
    if unused := (_RAY - _TCP if docker else _RAY).intersection(names):
        name = min(unused)
        too = "" if name not in _TCP else ", and for --backend docker where the daemon is another machine's"
        raise UsageError(f"--{name.replace('_', '-')} is for --backend ray and for --shards{too}")


def stored(values: Mapping[str, object], given: Mapping[str, object]) -> RunConfig:
    """A stored run's configuration, with the few options that `resume` may change. Raises UsageError."""
    try:
        config = RunConfig.model_validate(_merge(values, given))
    except ValidationError as error:
        raise UsageError("\n".join(Source().explain(one, given, ()) for one in error.errors())) from None
    _placed(config, given)
    return config


def _merge(values: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Lay options over a file's values; a part of another kind than the file's replaces the file's part."""
    merged = dict(values)
    for part in _PARTS:
        own = {key: given[key] for key in _keys(part) if key in given}
        before = _named(merged.get(part, {}))
        if part in given and not (isinstance(before, dict) and before.get("kind") == given[part]):
            before = {"kind": given[part]}
        if own and isinstance(before, dict):
            before = {"kind": "replay" if part == "policy" else "local"} | before | own
        if before:
            merged[part] = before
    return merged | {key: value for key, value in given.items() if key in RunConfig.model_fields and key not in _PARTS}


def _keys(part: str) -> set[str]:
    return {key for model in _PARTS[part].values() for key in model.model_fields} - {"kind"}

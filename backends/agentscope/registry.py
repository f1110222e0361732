"""Which kinds of sandbox there are, and what is known of each: image, resources, variables, time limit.

Owns the table that `SandboxRegistry.register` fills; registering a kind again replaces it. The original images serve
AgentScope's own protocol; an environment of this project's catalogue needs none of them, and starts without.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from orchestrator.errors import UsageError
from orchestrator.names import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

C = TypeVar("C", bound=type)

IMAGE_TAG: Final = os.environ.get("RUNTIME_SANDBOX_IMAGE_TAG", "latest")
TIMEOUT: Final = 60
"""Seconds that one call may take where a kind does not say."""
_ARM: Final = ("arm64", "aarch64", "armv7l", "armv8")


def get_image_tag() -> str:
    """The tag of the original images for this machine: `latest`, or `latest-arm64`."""
    return f"{IMAGE_TAG}-arm64" if platform.machine().lower() in _ARM else IMAGE_TAG


class SandboxType(StrEnum):
    """The kinds of sandbox, named like the environments they serve.

    `SandboxType("mine")` is a member too once `SandboxRegistry.register` knows it.
    """

    APPWORLD = "appworld"
    """Apps and their APIs, used by code."""
    BFCL = "bfcl"
    """Function calling, in one turn and in many."""
    WEBSHOP = "webshop"
    """A shop with a search engine."""

    @classmethod
    def _missing_(cls, value: object) -> SandboxType | None:
        return _own.get(value) if isinstance(value, str) else None


_own: dict[str, SandboxType] = {}
"""Registered kinds beside the members."""


def registered() -> set[str]:
    """The names of all kinds: members, and those of your own."""
    return {*SandboxType, *_own}


def made(name: str) -> SandboxType:
    """The kind called `name`, made where it is new."""
    try:
        return SandboxType(name)
    except ValueError:
        new = str.__new__(SandboxType, name)
        new._name_ = name.upper()
        new._value_ = name
        return _own.setdefault(name, new)


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """What a kind was registered with. `timeout` is in seconds and bounds one call of an instance."""

    image_name: str
    sandbox_type: SandboxType
    resource_limits: Mapping[str, Any] = field(default_factory=dict)
    security_level: str = "medium"
    timeout: float = TIMEOUT
    description: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    runtime_config: Mapping[str, Any] = field(default_factory=dict)


class SandboxRegistry:
    """The kinds of sandbox by class and by type."""

    _by_class: ClassVar[dict[type, SandboxConfig]] = {}
    _by_type: ClassVar[dict[SandboxType, type]] = {}

    @classmethod
    def register(
        cls,
        image_name: str,
        sandbox_type: SandboxType | str,
        resource_limits: Mapping[str, Any] | None = None,
        security_level: str = "medium",
        timeout: float = TIMEOUT,
        description: str = "",
        environment: Mapping[str, str] | None = None,
        runtime_config: Mapping[str, Any] | None = None,
    ) -> Callable[[C], C]:
        """A class decorator: makes the class the one for `sandbox_type`, a member or a name of your own.

        `environment` holds variables for what the sandbox runs, `runtime_config` and `resource_limits` its container's
        settings. Raises UsageError for an image without a name or a time that is not positive.
        """
        if not image_name:
            raise UsageError("SandboxRegistry.register needs the name of an image")
        if not timeout > 0:
            raise UsageError(f"timeout must be a positive number of seconds, not {timeout!r}")
        config = SandboxConfig(
            image_name,
            made(str(sandbox_type)),
            dict(resource_limits or {}),
            security_level,
            timeout,
            description,
            dict(environment or {}),
            dict(runtime_config or {}),
        )

        def decorate(target: C) -> C:
            cls._by_class[target] = config
            cls._by_type[config.sandbox_type] = target
            return target

        return decorate

    @classmethod
    def get_config(cls, target_class: type) -> SandboxConfig | None:
        """What a class was registered with."""
        return cls._by_class.get(target_class)

    @classmethod
    def get_image(cls, target_class: type) -> str | None:
        """The image a class was registered with."""
        config = cls.get_config(target_class)
        return None if config is None else config.image_name

    @classmethod
    def get_classes_by_type(cls, sandbox_type: SandboxType | str) -> type | None:
        """The class that was registered last for a kind. Raises UnknownName."""
        return cls._by_type.get(_known(sandbox_type))

    @classmethod
    def get_config_by_type(cls, sandbox_type: SandboxType | str) -> SandboxConfig | None:
        """What a kind was registered with. Raises UnknownName."""
        target = cls.get_classes_by_type(sandbox_type)
        return None if target is None else cls.get_config(target)

    @classmethod
    def get_image_by_type(cls, sandbox_type: SandboxType | str) -> str | None:
        """The image of a kind. Raises UnknownName."""
        config = cls.get_config_by_type(sandbox_type)
        return None if config is None else config.image_name

    @classmethod
    def list_all_sandboxes(cls) -> dict[type, SandboxConfig]:
        """All registered classes."""
        return dict(cls._by_class)


def _known(sandbox_type: SandboxType | str) -> SandboxType:
    if sandbox_type not in registered():
        raise unknown("sandbox type", str(sandbox_type), registered())
    return SandboxType(sandbox_type)

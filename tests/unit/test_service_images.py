"""What an image that serves AgentScope's protocol is run with, and the solutions that a command is given for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from backends.agentscope.image import service_image
from backends.agentscope.registry import SandboxConfig, SandboxType
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.service_image import ServiceImage, Volume, volumes_of
from orchestrator.cli.build import absolute
from orchestrator.cli.config import Docker, Remote, load, stored
from orchestrator.cli.solutions import read
from orchestrator.errors import UsageError

SERVICE = {"env": "x", "backend": "docker", "image_protocol": "env_service", "image": "i"}


def test_a_container_is_told_to_have_no_network_no_capability_and_bounds() -> None:
    told = ServiceImage("i").config("x", 16, {"label": "value"})
    host = told["HostConfig"]
    assert (host["NetworkMode"], host["CapDrop"], host["SecurityOpt"]) == ("none", ["ALL"], ["no-new-privileges"])
    assert host["Memory"] == (2048 + 16 * 512) << 20 == host["MemorySwap"]
    assert host["PidsLimit"] == 1024 + 16 * 128
    assert "uid=" not in host["Tmpfs"]["/tmp"]
    assert "User" not in told
    assert told["Env"] == ["OPENAI_API_KEY=none"]
    assert told["Labels"]["label"] == "value"


def test_the_relay_shares_the_network_of_its_service_and_nothing_else() -> None:
    told = ServiceImage("i", port=8080).relay("base", "the-service", Path("/folder"), {})
    assert told["HostConfig"]["NetworkMode"] == "container:the-service"
    assert told["Cmd"] == ["8080"]
    assert told["User"] == "65534:65534"
    assert [mount["Source"] for mount in told["HostConfig"]["Mounts"]] == ["/folder"]


def test_what_is_given_comes_over_what_originals_need() -> None:
    given = Hardening(user="1000:1000", memory_mb=64, tmp_mb=8)
    told = ServiceImage("i", hardening=given, variables={"OPENAI_API_KEY": "mine"}).config("x", 1, {})
    assert told["User"] == "1000:1000"
    assert told["HostConfig"]["Memory"] == 64 << 20
    assert told["HostConfig"]["ReadonlyRootfs"] is True
    assert told["HostConfig"]["Tmpfs"]["/tmp"].endswith(",size=8m")
    assert told["Env"] == ["OPENAI_API_KEY=mine"]


def test_an_image_without_a_name_or_with_destinations_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a name"):
        ServiceImage("")
    with pytest.raises(UsageError, match="egress"):
        ServiceImage("i", hardening=Hardening(egress=("example.org:443",)))


@pytest.mark.parametrize(
    ("given", "volume"),
    [
        ({"/a": {"bind": "/b", "mode": "ro"}}, Volume(Path("/a"), "/b", read_only=True)),
        ({"/a": {"bind": "/b"}}, Volume(Path("/a"), "/b", read_only=False)),
        (["/a:/b:ro"], Volume(Path("/a"), "/b", read_only=True)),
        (["/a"], Volume(Path("/a"), "/a", read_only=False)),
    ],
)
def test_volumes_are_read_as_the_docker_client_has_them(given: object, volume: Volume) -> None:
    assert volumes_of(given) == (volume,)


@pytest.mark.parametrize("given", [{"a": {"bind": "/b"}}, ["/a:b"], ["/a:/b:exec"], {"/a": "/b"}, "/a:/b"])
def test_volumes_that_are_none_are_refused(given: object) -> None:
    with pytest.raises(UsageError, match="volume"):
        volumes_of(given)


def test_a_registered_kinds_settings_are_its_containers() -> None:
    config = SandboxConfig(
        "i",
        SandboxType.BFCL,
        resource_limits={"memory": "4Gi", "cpu": "2"},
        environment={"A": "b"},
        runtime_config={"shm_size": "8.06gb", "pids_limit": 99, "user": 1000, "volumes": ["/a:/b"]},
    )
    image = service_image(config)
    host = image.config("bfcl", 1, {})["HostConfig"]
    assert host["Memory"] == 4 << 30
    assert host["ShmSize"] == int(8.06 * 1024) << 20
    assert (host["NanoCpus"], host["PidsLimit"]) == (2 * 10**9, 99)
    assert (image.hardening.user, image.hardening.read_only) == ("1000", False)
    assert image.variables == {"A": "b"}
    assert [mount["ReadOnly"] for mount in host["Mounts"]] == [False]


def test_a_stored_configuration_of_an_image_is_read_as_it_was(tmp_path: Path) -> None:
    config = load(None, SERVICE | {"hardening": ["tmp_mb=9"], "image_env": ["A=b=c"]})
    assert isinstance(config.backend, Docker)
    assert config.backend.image_env == {"A": "b=c"}
    assert (config.backend.hardening.tmp_mb, config.backend.hardening.user) == (9, "")
    assert stored(config.model_dump(mode="json"), {}) == config
    plain = load(None, {"env": "toy", "backend": "docker"})
    assert stored(plain.model_dump(mode="json"), {}) == plain


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"env": "x", "backend": "docker", "image_protocol": "env_service"}, "name it with --image"),
        ({"env": "x", "backend": "docker", "image_env": ["A=b"]}, "image_env belongs to"),
        ({"env": "x", "backend": "docker", "solutions": "f"}, "solutions belongs to"),
        (SERVICE | {"image_env": ["A"]}, "NAME=VALUE"),
    ],
)
def test_options_that_would_change_nothing_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(None, given)


def test_solutions_are_stored_by_their_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kept in (("given.jsonl", str(tmp_path / "given.jsonl")), ("reference", "reference")):
        config = absolute(load(None, {"env": "x", "backend": "remote", "url": "http://h", "solutions": name}))
        assert isinstance(config.backend, Remote)
        assert config.backend.solutions == kept


def test_solutions_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "solutions.jsonl"
    action = {"role": "assistant", "content": "add 1"}
    file.write_bytes(orjson.dumps({"task": "a", "actions": [action]}) + b"\n\n")
    assert {task: [orjson.loads(one) for one in actions] for task, actions in read(str(file)).items()} == {
        "a": [action]
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no solution"),
        ("{", "solutions.jsonl:1: not JSON"),
        ('{"task": "a", "actions": []}', "solutions.jsonl:1: a line is"),
        ('{"task": "a", "actions": [{"role": "user"}]}', "solutions.jsonl:1: a line is"),
        ('{"task": 1, "actions": [{"role": "assistant"}]}', "solutions.jsonl:1: a line is"),
        ('{"task": "a", "actions": [{"role": "assistant"}]}\n' * 2, "solutions.jsonl:2: the task a stands there"),
    ],
)
def test_solutions_that_are_none_are_refused_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "solutions.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        read(str(file))


def test_solutions_that_are_not_there_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the solutions"):
        read(str(tmp_path / "absent"))

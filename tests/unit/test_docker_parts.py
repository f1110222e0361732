"""The parts of the Docker backend that need no daemon: settings, causes of death, owners, what is used."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backends.environments.catalog import Resources, find
from backends.sandboxes.docker import images, usage, wheels
from backends.sandboxes.docker.base import base_name
from backends.sandboxes.docker.death import describe
from backends.sandboxes.docker.hardening import Hardening
from backends.sandboxes.docker.images import BASE, DIGEST, ENVIRONMENT, RECIPE, ensure, image_name, recipe
from backends.sandboxes.docker.owners import NAMESPACE, OWNER, Standing, owner_labels, standing
from backends.sandboxes.docker.port import ContainerState, EngineRefused, NotThere
from backends.sandboxes.docker.usage import Usage, first_child
from orchestrator.cli.config import Docker, load
from orchestrator.errors import Unavailable, UsageError
from orchestrator.rundir import Owner
from orchestrator.types import FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TestHardening:
    def test_each_item_switches_one_thing(self) -> None:
        plain = Hardening().host_config(Resources())
        switched: dict[str, tuple[object, set[str]]] = {
            "drop_capabilities": (False, {"CapDrop"}),
            "no_new_privileges": (False, {"SecurityOpt"}),
            "seccomp": (False, {"SecurityOpt"}),
            "read_only": (False, {"ReadonlyRootfs"}),
            "init": (False, {"Init"}),
            "network": ("bridge", {"NetworkMode"}),
            "runtime": ("runsc", {"Runtime"}),
            "open_files": (70, {"Ulimits"}),
            "cpus": (0.5, {"NanoCpus"}),
            "memory_mb": (70, {"Memory", "MemorySwap"}),
            "pids": (7, {"PidsLimit"}),
            "tmp_mb": (7, {"Tmpfs"}),
            "shm_mb": (7, {"ShmSize"}),
            "user": ("1000", {"Tmpfs"}),
            "egress": (("example.org:443",), set()),
        }
        assert switched.keys() == asdict(Hardening()).keys()
        for item, (value, expected) in switched.items():
            changed = Hardening(**{item: value}).host_config(Resources())  # type: ignore[arg-type]
            assert {key for key in changed if changed[key] != plain.get(key)} == expected, item

    def test_an_environments_bounds_hold_unless_others_are_given(self) -> None:
        asked = Resources(cpus=2.0, memory_mb=100, pids=10, tmp_mb=0, shm_mb=1)
        assert Hardening().bounds(asked) == asked
        assert Hardening(memory_mb=70, pids=0).bounds(asked) == Resources(2.0, 70, 0, 0, 1)
        assert "size" not in Hardening().host_config(asked)["Tmpfs"]["/tmp"]

    def test_a_negative_bound_is_refused(self) -> None:
        with pytest.raises(ValueError, match="pids must be positive"):
            Hardening(pids=-1)

    @pytest.mark.parametrize(
        "items",
        [{"user": "root"}, {"user": "1:"}, {"user": "1:2:3"}, {"user": "-1"}, {"user": "99999999999"},
         {"open_files": 0}, {"open_files": -1}, {"memory_mb": 1}],
    )  # fmt: skip
    def test_what_no_container_starts_with_is_refused(self, items: dict[str, Any]) -> None:
        [name] = items
        with pytest.raises(ValueError, match=f"{name} must be"):
            Hardening(**items)

    def test_the_command_line_can_allow_nothing_where_an_environment_names_destinations(self) -> None:
        stored = load(None, {"env": "toy", "backend": "docker", "hardening": ("egress=none",)}).backend
        assert stored == Docker(kind="docker", hardening=Hardening(egress=()))

    def test_the_command_line_is_told_in_whole_sentences(self) -> None:
        for item, says in (
            ("bogus=1", "there is no item 'bogus'; .*egress"),
            ("user=root", "user must be .* not 'root'"),
        ):
            with pytest.raises(UsageError, match=f"^--hardening: {says}$"):
                load(None, {"env": "toy", "backend": "docker", "hardening": (item,)})

    def test_no_bound_is_none(self) -> None:
        """The engine takes a size of 0 for its own default where shared memory is meant."""
        config = Hardening(shm_mb=0, memory_mb=0, pids=0, cpus=0).host_config(Resources())
        assert config["ShmSize"] > 1 << 40
        assert (config["Memory"], config["PidsLimit"], config["NanoCpus"]) == (0, 0, 0)


class TestDeath:
    def state(self, code: int, *, oom: bool = False, error: str = "") -> ContainerState:
        return ContainerState("id", running=False, paused=False, pid=0, exit_code=code, oom_killed=oom, error=error)

    @pytest.mark.parametrize(
        ("code", "oom", "kind", "says"),
        [
            (128 + signal.SIGALRM, False, FailureKind.SANDBOX_HUNG, "time limit"),
            (128 + signal.SIGALRM, True, FailureKind.SANDBOX_HUNG, "time limit"),
            (128 + signal.SIGKILL, False, FailureKind.SANDBOX_LOST, "SIGKILL"),
            (128 + signal.SIGKILL, True, FailureKind.SANDBOX_LOST, "may use 64 MiB"),
            (128 + signal.SIGABRT, False, FailureKind.SANDBOX_LOST, "SIGABRT"),
            (9, True, FailureKind.SANDBOX_LOST, "code 9"),
            (0, False, FailureKind.SANDBOX_LOST, "code 0"),
            (255, False, FailureKind.SANDBOX_LOST, "code 255"),
        ],
    )
    def test_what_an_end_says(self, code: int, oom: bool, kind: FailureKind, says: str) -> None:
        failure = describe(self.state(code, oom=oom), 64)
        assert failure.kind is kind
        assert says in failure.message

    def test_the_daemons_own_words_come_through(self) -> None:
        assert "no such runtime" in describe(self.state(127, error="no such runtime"), 0).message


class TestOwners:
    def labels(self, owner: Owner, namespace: str | None = None) -> dict[str, str]:
        here = owner_labels()[NAMESPACE]
        return {OWNER: f"{owner.boot}:{owner.pid}:{owner.start}", NAMESPACE: here if namespace is None else namespace}

    def test_who_is_alive(self) -> None:
        me = Owner.current()
        assert standing(owner_labels()) is Standing.ALIVE
        assert standing(self.labels(Owner(me.boot, me.pid, me.start + 1))) is Standing.DEAD, "its number was reused"
        assert standing(self.labels(Owner(me.boot, 2**22 + 1, 1))) is Standing.DEAD
        assert standing(self.labels(Owner("an earlier boot", me.pid, me.start))) is Standing.DEAD

    def test_who_cannot_be_judged_from_here(self) -> None:
        me = Owner.current()
        elsewhere = self.labels(Owner(me.boot, 2**22 + 1, 1), namespace="pid:[1]")
        assert standing(elsewhere) is Standing.UNKNOWN
        for labels in ({}, {OWNER: "gibberish"}, {OWNER: "a:b:c"}, {OWNER: f"{me.boot}:1"}):
            assert standing(labels) is Standing.UNKNOWN


class TestUsage:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(usage, "_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(usage, "_PROC", tmp_path / "proc")
        return tmp_path

    def write(self, root: Path, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")

    def test_the_first_version(self, root: Path) -> None:
        cgroup = "9:name=systemd:/docker/x\n5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/\n"
        self.write(
            root,
            {
                "proc/7/cgroup": cgroup,
                "cgroup/cpu,cpuacct/docker/x/cpuacct.usage": "1500000000\n",
                "cgroup/memory/docker/x/memory.usage_in_bytes": "1000\n",
                "cgroup/memory/docker/x/memory.stat": "cache 5\ntotal_inactive_file 300\n",
                "cgroup/memory/docker/x/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            },
        )
        found = Usage(7)
        assert (found.cpu_seconds(), found.memory_bytes(), found.oom_kills()) == (1.5, 700, 2)

    def test_the_second_version(self, root: Path) -> None:
        folder = "cgroup/system.slice/docker-x.scope"
        self.write(
            root,
            {
                "proc/7/cgroup": "0::/system.slice/docker-x.scope\n",
                f"{folder}/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
                f"{folder}/memory.current": "1000\n",
                f"{folder}/memory.stat": "anon 1\ninactive_file 100\n",
                f"{folder}/memory.events": "low 0\noom 1\noom_kill 1\n",
            },
        )
        found = Usage(7)
        assert (found.cpu_seconds(), found.memory_bytes(), found.oom_kills()) == (2.5, 900, 1)
        assert found.new_oom_kills() == 0
        (root / folder / "memory.events").write_text("oom_kill 4\n", encoding="ascii")
        assert found.new_oom_kills() == 3

    def test_what_was_last_read_stays_when_the_container_is_gone(self, root: Path) -> None:
        name = "cgroup/x/cpu.stat"
        self.write(root, {"proc/7/cgroup": "0::/x\n", name: "usage_usec 1000000\n"})
        found = Usage(7)
        assert found.cpu_seconds() == 1.0
        (root / name).unlink()
        assert found.cpu_seconds() == 1.0
        assert found.memory_bytes() == 0

    def test_nothing_to_be_seen_is_zero(self, root: Path) -> None:
        for found in (Usage(0), Usage(7)):
            assert (found.cpu_seconds(), found.memory_bytes(), found.oom_kills()) == (0.0, 0, 0)
        assert first_child(7) == 0

    def test_this_process_is_seen(self) -> None:
        assert Usage(os.getpid()).cpu_seconds() >= 0.0


class FakeEngine:
    """Images by name with their labels; what can be pulled; what was asked."""

    def __init__(self, images: dict[str, dict[str, str]], registry: dict[str, dict[str, str]] | None = None) -> None:
        self.images = images
        self.registry = registry or {}
        self.pulled: list[str] = []

    async def image_labels(self, image: str) -> dict[str, str]:
        if image not in self.images:
            raise NotThere(f"no image {image}", 404)
        return self.images[image]

    async def pull(self, image: str, progress: Any, **options: object) -> None:
        self.pulled.append(image)
        if image not in self.registry:
            raise EngineRefused("no such repository", 500)
        self.images[image] = self.registry[image]


class TestImages:
    SPEC = find("toy")
    RIGHT = {ENVIRONMENT: "toy", DIGEST: SPEC.digest, RECIPE: recipe()}  # noqa: RUF012  # read only
    OLDER = RIGHT | {RECIPE: "another"}  # read only

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        tags: list[str] = []

        async def build(engine: FakeEngine, spec: Any, progress: Any, *, tag: str) -> str:
            tags.append(tag)
            engine.images[tag] = self.RIGHT
            return tag

        monkeypatch.setattr(images, "build", build)
        return tags

    async def ensured(self, engine: FakeEngine, image: str | None = None, **options: bool) -> str:
        return await ensure(engine, self.SPEC, image, lambda step: None, **options)  # type: ignore[arg-type]

    async def test_the_one_there_is(self, built: list[str]) -> None:
        engine = FakeEngine({image_name(self.SPEC): self.RIGHT})
        assert await self.ensured(engine) == image_name(self.SPEC)
        assert (engine.pulled, built) == ([], [])

    async def test_a_missing_one_is_built_and_never_pulled(self, built: list[str]) -> None:
        """Its made-up name belongs to nobody in a registry, or to somebody else."""
        engine = FakeEngine({}, registry={image_name(self.SPEC): self.RIGHT})
        assert await self.ensured(engine) == image_name(self.SPEC)
        assert (engine.pulled, built) == ([], [image_name(self.SPEC)])

    async def test_none_is_built_for_a_machine_of_another_kind(self) -> None:
        class Other(FakeEngine):
            remote, url = True, "tcp://far.example"

            async def info(self) -> dict[str, str]:
                return {"Architecture": "s390x"}

        says = "daemon at tcp://far.example is s390x .*`rollout image build toy` on that machine"
        with pytest.raises(Unavailable, match=says):
            await self.ensured(Other({}))

    async def test_a_named_one_is_pulled_or_else_built(self, built: list[str]) -> None:
        engine = FakeEngine({}, registry={"mine:1": self.RIGHT})
        assert await self.ensured(engine, "mine:1") == "mine:1"
        assert (engine.pulled, built) == (["mine:1"], [])
        assert await self.ensured(engine, "mine:2") == "mine:2"
        assert (engine.pulled, built) == (["mine:1", "mine:2"], ["mine:2"])

    @pytest.mark.parametrize(
        ("labels", "says"),
        [
            ({ENVIRONMENT: "toy", DIGEST: "0"}, r"stale: it holds toy 0.*--tag mine`"),
            ({ENVIRONMENT: "bfcl", DIGEST: SPEC.digest}, r"holds environment bfcl, not toy: .*--tag IMAGE`"),
            ({}, r"holds no environment of this project, not toy: .*--tag IMAGE`"),
        ],
    )
    async def test_another_content_is_refused(self, labels: dict[str, str], says: str, built: list[str]) -> None:
        """And nobody is told to build over an image of somebody else's."""
        with pytest.raises(Unavailable, match=says):
            await self.ensured(FakeEngine({"mine": labels}), "mine")
        assert built == []

    async def test_one_that_was_made_in_another_way_is_made_anew_unless_it_was_named(self, built: list[str]) -> None:
        name = image_name(self.SPEC)
        assert await self.ensured(FakeEngine({name: self.OLDER})) == name
        assert built == [name]
        assert await self.ensured(FakeEngine({"mine": self.OLDER}), "mine") == "mine"
        assert built == [name]

    async def test_a_base_image_that_was_made_in_another_way_is_made_anew(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[str] = []

        async def build_base(engine: Any, progress: Any) -> str:
            made.append(base_name())
            return base_name()

        monkeypatch.setattr(images, "build_base", build_base)
        for labels in ({BASE: self.RIGHT[RECIPE]}, {BASE: base_name()}):
            engine: Any = FakeEngine({base_name(): labels})
            assert await images.base_image(engine, lambda step: None) == base_name()
        assert made == [base_name()]

    async def test_nothing_is_built_where_that_is_not_wanted(self, built: list[str]) -> None:
        with pytest.raises(Unavailable, match="rollout image build toy"):
            await self.ensured(FakeEngine({}), build_missing=False)
        assert built == []


class TestWheels:
    SPEC = find("bfcl")

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where downloads go."""
        monkeypatch.setenv("ROLLOUT_HOME", str(tmp_path))
        return tmp_path / "wheels"

    def pip(self, monkeypatch: pytest.MonkeyPatch, *, breaks: bool) -> list[Sequence[str]]:
        asked: list[Sequence[str]] = []

        async def run(arguments: Sequence[str]) -> None:
            asked.append(arguments)
            await asyncio.to_thread(Path(arguments[arguments.index("-d") + 1], f"{len(asked)}.whl").touch)
            if breaks:
                raise Unavailable("pip download failed")

        monkeypatch.setattr(wheels, "_pip", run)
        return asked

    async def test_a_download_serves_later_builds(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.pip(monkeypatch, breaks=False)
        found = await wheels.download(self.SPEC, lambda step: None)
        assert sorted(os.listdir(found)) == ["1.whl", "2.whl"]
        assert "pip" in asked[0]
        assert "--no-deps" in asked[1]
        assert await wheels.download(self.SPEC, lambda step: None) == found
        assert len(asked) == 2
        assert os.listdir(folder) == [found.name]

    async def test_one_that_fails_leaves_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pip(monkeypatch, breaks=True)
        killed = folder / ".bfcl-left"
        killed.mkdir(parents=True)
        os.utime(killed, (0, 0))
        with pytest.raises(Unavailable):
            await wheels.download(self.SPEC, lambda step: None)
        assert os.listdir(folder) == []

    def test_a_folder_without_pip_is_refused_with_the_command_that_fills_it(self, tmp_path: Path) -> None:
        with pytest.raises(
            Unavailable, match=rf"no wheel of pip.*pip download -d {tmp_path} pip .*--no-deps bfcl-eval"
        ):
            wheels.check(tmp_path, self.SPEC)
        (tmp_path / "pip-25.0-py3-none-any.whl").touch()
        wheels.check(tmp_path, self.SPEC)

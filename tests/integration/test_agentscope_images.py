"""Boxes of a kind that is registered with an image of its own, and with no server named: the image is started."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from service_images import COUNTING, counting

from backends.agentscope import AsyncTrainingSandbox, SandboxRegistry, TrainingSandbox
from bench.strikes import docker
from orchestrator.errors import SandboxError, SandboxLost, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("containers")


@pytest.fixture(scope="module")
def image(daemon: None) -> str:
    return asyncio.run(counting())


@pytest.fixture
def registry() -> Iterator[None]:
    kept = dict(SandboxRegistry._by_class), dict(SandboxRegistry._by_type)
    yield
    SandboxRegistry._by_class, SandboxRegistry._by_type = kept


def register(kind: type, **settings: Any) -> type:
    SandboxRegistry.register(COUNTING, sandbox_type="counting", timeout=20, **settings)(kind)
    return kind


@pytest.mark.usefixtures("image", "registry")
def test_a_box_of_a_registered_image_works_as_any_other(tmp_path: Path) -> None:
    class Counting(TrainingSandbox):
        pass

    register(
        Counting,
        environment={"GREETING": "hello"},
        runtime_config={"shm_size": "0.5gb", "volumes": {str(tmp_path): {"bind": "/d", "mode": "ro"}}},
        resource_limits={"memory": "512Mi", "cpu": "0.5"},
    )
    with Counting(box_type="counting") as box:
        tasks = box.get_env_profile(env_type="counting", split="train")
        assert tasks[0] == "count_0"
        created = box.create_instance("counting", "about")
        told = orjson.loads(created["state"][0]["content"])
        assert (told["interfaces"], told["data"]) == (["lo"], True)
        assert told["environ"] == {"OPENAI_API_KEY": "none", "GREETING": "hello"}
        one = box.create_instance("counting", tasks[0])["info"]["instance_id"]
        for number in (1, 1, 1, 1, 1, 1):
            answer = box.step(one, {"role": "assistant", "content": f"add {number}"})
        assert (answer["reward"], answer["is_terminated"]) == (1.0, True)
        assert box.evaluate(one, params={"sparse": True}) == 1.0
        assert box.release_instance(one) is True
        with pytest.raises(UsageError, match="not found"):
            box.step(one, {"role": "assistant", "content": "add 1"})
        info = box.get_info()
        assert (info["state"], info["version"]) == ("running", COUNTING)
        shown = orjson.loads(docker("inspect", info["container_name"]))[0]["HostConfig"]
        assert (shown["ShmSize"], shown["Memory"], shown["NanoCpus"]) == (1 << 29, 1 << 29, 500_000_000)


@pytest.mark.usefixtures("image", "registry")
async def test_a_box_whose_container_ends_says_why() -> None:
    class Counting(AsyncTrainingSandbox):
        pass

    register(Counting)
    async with Counting(box_type="counting") as box:
        one = (await box.create_instance("counting", "count_0"))["info"]["instance_id"]
        with pytest.raises(SandboxLost, match="exited with code 9"):
            await box.step(one, {"role": "assistant", "content": "crash"})
        with pytest.raises(SandboxError, match="exited with code 9"):
            await box.step(one, {"role": "assistant", "content": "add 1"})
        assert (await box.get_info())["state"] == "error"


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"runtime_config": {"privileged": True}}, "'privileged' is no setting"),
        ({"runtime_config": {"shm_size": "much"}}, "5.06gb, not 'much'"),
        ({"runtime_config": {"volumes": ["here:/there"]}}, "both paths are absolute"),
        ({"resource_limits": {"gpu": 1}}, "'gpu' is no setting"),
    ],
)
def test_settings_that_a_container_cannot_have_are_refused(settings: dict[str, Any], says: str) -> None:
    class Counting(TrainingSandbox):
        pass

    register(Counting, **settings)
    with pytest.raises(UsageError, match=says):
        Counting(box_type="counting").start()

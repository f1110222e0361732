"""The HTTP service with real sandboxes: its shapes, its refusals, idle instances, lost sandboxes, its end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from serving import client, say, serving, solutions

from backends.sandboxes.local import LocalBackend
from orchestrator.errors import Unavailable, UsageError
from orchestrator.service import Service, ServiceLimits, register
from orchestrator.testing.leaks import processes

if TYPE_CHECKING:
    from serving import Client


async def test_bfcl_episodes_in_the_shapes_of_the_original() -> None:
    known = await solutions("bfcl", ["multi_turn_base_0", "multi_turn_miss_func_3"])
    async with serving("bfcl") as service, client(service) as http:
        tasks = await http.done("get_env_profile", env_type="bfcl", params={"split": "train"})
        assert tasks[0] == "multi_turn_base_0"
        for task, actions in known.items():
            made = await http.done("create", env_type="bfcl", task_id=task)
            assert set(made) == {"state", "info"}
            assert [message["role"] for message in made["state"]] == ["system", "user"]
            name = made["info"]["instance_id"]
            assert name.startswith("exp_")
            steps = [await http.done("step", instance_id=name, messages=action) for action in actions]
            assert all(set(step) == {"state", "reward", "is_terminated", "info"} for step in steps)
            assert [step["is_terminated"] for step in steps] == [False] * (len(steps) - 1) + [True]
            assert await http.done("evaluate", instance_id=name, params={"sparse": True}) == 1.0
            assert (await http.done("evaluate", instance_id=name))["accuracy"] == 1.0
            assert "Available tools" in await http.done("get_info", instance_id=name)
            assert await http.post("release", instance_id=name) == (200, {"success": True, "data": None})
            assert await http.post("release", instance_id=name) == (200, {"success": False, "data": None})


@pytest.mark.parametrize(
    ("route", "body", "status", "says"),
    [
        ("create", {}, 400, "task_id is required"),
        ("create", {"task_id": "none"}, 400, "unknown task 'none'"),
        ("create", {"task_id": "toy_1", "env_type": "toi"}, 400, "did you mean 'toy'"),
        ("create", {"task_id": "toy_1", "params": {"answer_path": "/etc/passwd"}}, 400, "answer_path"),
        ("create", {"task_id": "toy_1", "instance_id": "x" * 200}, 400, "128"),
        ("create", {"task_id": "toy_1", "instance_id": "taken"}, 409, "exists already"),
        ("create", {"task_id": 7}, 422, "task_id"),
        ("create", {"task_id": "open_error"}, 500, "RuntimeError"),
        ("create", {"task_id": "open_crash"}, 422, "ended its sandbox"),
        ("step", {}, 400, "instance_id is required"),
        ("step", {"instance_id": "nobody", "messages": say("add 1")}, 404, "not found"),
        ("step", {"instance_id": "taken", "messages": []}, 422, "messages"),
        ("step", {"instance_id": "taken", "messages": {}}, 400, "an action is a message"),
        ("step", {"instance_id": "taken", "messages": say("crash")}, 422, "ended its sandbox"),
        ("step", {"instance_id": "taken", "messages": say("error")}, 500, "RuntimeError"),
        ("step", {"instance_id": "taken", "messages": say("nan")}, 500, "not a finite number"),
        ("evaluate", {"instance_id": "nobody"}, 404, "not found"),
        ("get_env_profile", {"params": {"split": "toyy"}}, 400, "did you mean 'toy'"),
        ("get_env_profile", {"params": {"split": 3}}, 400, "split"),
        ("no_such_route", {}, 404, "Not Found"),
    ],
)
async def test_what_is_refused_and_how(
    service: Client, route: str, body: dict[str, Any], status: int, says: str
) -> None:
    answered, answer = await service.post(route, **body)
    assert (answered, list(answer)) == (status, ["detail"])
    assert says in answer["detail"]
    assert "Traceback" not in answer["detail"]
    # whatever was refused, nothing is held for it, and the instance stands where it stood
    async with service.http.get(f"{service.url}/health") as response:
        assert (await response.json())["instances"] == 1
    assert (await service.done("step", instance_id="taken", messages=say("add 1")))["state"][0]["content"] == "total 1"


@pytest.fixture
async def service() -> Any:
    async with serving() as made, client(made) as http:
        await http.done("create", task_id="toy_0", instance_id="taken")
        yield http


async def test_bodies_that_are_no_objects_are_refused(service: Client) -> None:
    for data, status in (
        (b"{", 422),
        (b"[1]", 422),
        (b"\xff", 422),
        (b"[" * 100_000, 422),
        (io.BytesIO(b"1" * 5_000_000), 413),
    ):
        async with service.http.post(f"{service.url}/step", data=data) as response:
            assert response.status == status
            assert list(orjson.loads(await response.read())) == ["detail"]
    async with service.http.get(f"{service.url}/step") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_a_token_is_asked_for_and_divides_the_instances() -> None:
    async with serving(tokens={"one": "s3cret", "two": "other"}) as made:
        async with client(made) as nobody, client(made, "wrong") as wrong:
            for http in (nobody, wrong):
                async with http.http.post(f"{made.url}/create", data=b"{}") as response:
                    assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
                async with http.http.get(f"{made.url}/wire") as response:
                    assert response.status == 401
            async with nobody.http.get(f"{made.url}/healthz") as response:
                assert (response.status, await response.text()) == (200, "OK")
        async with client(made, "s3cret") as one, client(made, "other") as two:
            await one.done("create", task_id="toy_0", instance_id="same")
            assert (await two.post("step", instance_id="same", messages=say("add 1")))[0] == 404
            await two.done("create", task_id="toy_1", instance_id="same")  # ids are each token's own
            await one.done("release", instance_id="same")
            await two.done("step", instance_id="same", messages=say("add 1"))


async def test_quotas_are_told_apart_from_a_full_service() -> None:
    limits = ServiceLimits(instances=3, instances_per_token=2)
    tokens = {"one": "a", "two": "b"}
    async with serving(tokens=tokens, limits=limits) as made, client(made, "a") as one, client(made, "b") as two:
        await one.done("create", task_id="toy_0", instance_id="0")
        await one.done("create", task_id="toy_0", instance_id="1")
        for http, status in ((one, 429), (two, 200), (two, 503)):
            async with http.http.post(f"{made.url}/create", data=orjson.dumps({"task_id": "toy_2"})) as response:
                assert response.status == status
                assert ("Retry-After" in response.headers) == (status != 200)
        await one.done("release", instance_id="0")
        await two.done("create", task_id="toy_2")  # room again
        assert made.health()["instances"] == 3


async def test_records_that_take_the_memory_they_may_admit_no_step_until_some_are_released() -> None:
    async with serving(limits=ServiceLimits(record_bytes=100_000)) as made, client(made) as http:
        for name in "ab":
            await http.done("create", task_id="toy_0", instance_id=name)
        assert made.health()["record_bytes"] > 0
        await http.done("step", instance_id="a", messages=say("x" * 150_000))
        for name in "ab":
            data = orjson.dumps({"instance_id": name, "messages": say("add 1")})
            async with http.http.post(f"{made.url}/step", data=data) as response:
                assert (response.status, "Retry-After" in response.headers) == (503, True)
        assert await http.done("evaluate", instance_id="a") == 0.5
        assert (await http.post("release", instance_id="a"))[0] == 200
        await http.done("step", instance_id="b", messages=say("add 1"))
        await http.post("release", instance_id="b")
        assert made.health()["record_bytes"] == 0


async def test_idle_instances_are_released_but_not_while_a_step_runs() -> None:
    limits = ServiceLimits(idle_s=0.3, step_s=5.0)
    async with serving(limits=limits) as made, client(made) as http:
        await http.done("create", task_id="toy_0", instance_id="idle")
        await http.done("create", task_id="toy_0", instance_id="busy")
        await http.done("step", instance_id="busy", messages=say("sleep 1.0"))
        assert (await http.done("step", instance_id="busy", messages=say("add 1")))["state"][0]["content"] == "total 1"
        status, answer = await http.post("step", instance_id="idle", messages=say("add 1"))
        assert status == 404
        assert "no call had named it for 0.3 s" in answer["detail"]
        assert made.health()["released_idle"] == 1
        await http.done("create", task_id="toy_0", instance_id="idle")  # the id is free again


async def test_why_an_instance_is_gone_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "REMEMBERED", 2)
    async with serving() as made, client(made) as http:
        for name in "abc":
            await http.done("create", task_id="toy_0", instance_id=name)
            await http.post("release", instance_id=name)
        told = [(await http.post("evaluate", instance_id=name))[1]["detail"] for name in "abc"]
        assert told == ["Instance a not found!", *(f"Instance {name} not found! It was released." for name in "bc")]


async def test_an_id_is_taken_as_soon_as_it_is_asked_for() -> None:
    async with serving() as made, client(made) as http:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(http.post("create", task_id="open_sleep", instance_id="a")) for _ in range(4)]
        assert sorted(task.result()[0] for task in asked) == [200, 409, 409, 409]
        assert made.health()["instances"] == 1


async def test_a_call_that_takes_too_long_is_given_up_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(limits=ServiceLimits(step_s=60.0)) as made, client(made) as http:
        await http.done("create", task_id="toy_0", instance_id="a")
        monkeypatch.setattr(ServiceLimits, "call_s", 0.3)
        data = orjson.dumps({"instance_id": "a", "messages": say("sleep 30")})
        async with asyncio.timeout(4), http.http.post(f"{made.url}/step", data=data) as response:
            assert (response.status, "Retry-After" in response.headers) == (503, True)
            assert (await response.json())["detail"] == "the call took too long"
        monkeypatch.undo()
        assert (await http.done("step", instance_id="a", messages=say("add 1")))["state"][0]["content"] == "total 1"


async def test_a_killed_sandbox_costs_no_instance() -> None:
    async with serving(sandboxes=1) as made, client(made) as http:
        names = [f"n{number}" for number in range(20)]
        for name in names:
            await http.done("create", task_id="toy_6", instance_id=name)
            await http.done("step", instance_id=name, messages=say("add 3"))
        victim = next(one for one in processes() if "backends.server" in one.command and one.parent == os.getpid())
        os.kill(victim.pid, signal.SIGKILL)
        for name in names:
            await http.done("step", instance_id=name, messages=say("add 4"))
            assert await http.done("evaluate", instance_id=name) == 1.0
        assert made.health()["status"] == "healthy"


async def test_draining_admits_nothing_and_lets_what_lives_go_on() -> None:
    async with serving() as made, client(made) as http:
        await http.done("create", task_id="toy_0", instance_id="lives")
        draining = asyncio.create_task(made.drain())
        await asyncio.sleep(0)
        assert (await http.post("create", task_id="toy_0"))[0] == 503
        async with http.http.get(f"{made.url}/healthz") as response:
            assert (response.status, "Retry-After" in response.headers) == (503, True)
        await http.done("step", instance_id="lives", messages=say("add 1"))
        assert await http.done("evaluate", instance_id="lives") == 1.0
        assert not draining.done()
        await http.post("release", instance_id="lives")
        assert await draining is True


async def test_a_client_that_hangs_up_gives_its_step_up_and_keeps_its_instance() -> None:
    async with serving() as made, client(made) as http:
        await http.done("create", task_id="toy_0", instance_id="a")
        step = asyncio.create_task(http.post("step", instance_id="a", messages=say("sleep 30")))
        await asyncio.sleep(0.2)
        step.cancel()
        await asyncio.wait({step})
        async with asyncio.timeout(3):
            assert (await http.done("step", instance_id="a", messages=say("add 1")))["state"][0]["content"] == "total 1"


async def test_every_route_of_the_document_is_there() -> None:
    async with serving(tokens={"one": "a"}) as made, client(made, "a") as http:
        async with http.http.get(f"{made.url}/openapi.json") as response:
            document = await response.json()
        posts = [path for path, item in document["paths"].items() if "post" in item]
        assert len(posts) == 6 + 2 * 14 - 3  # create, get_info and release are of both
        assert {path for path in posts if not document["paths"][path]["post"]["requestBody"]["required"]} >= {"/step"}
        assert document["paths"]["/call_tool"]["post"]["requestBody"]["required"]
        assert set(document["paths"]["/wire"]["get"]["responses"]) == {"101", "400", "401", "503"}
        for path in posts:
            status, _ = await http.post(path[1:])
            assert status != 404 or "Not Found" not in _["detail"], path
            assert document["paths"][path]["post"]["security"] == [{"bearer": []}]


async def test_what_cannot_be_served_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="token"):
        Service({"toy": lambda: LocalBackend("toy")}, host="0.0.0.0")
    with pytest.raises(UsageError, match="at least"):
        ServiceLimits(instances=0)
    async with serving() as made:
        port = int(made.url.rpartition(":")[2])
        with pytest.raises(UsageError, match="cannot listen"):
            async with Service({"toy": lambda: LocalBackend("toy")}, port=port):
                pass


async def test_sandboxes_that_cannot_be_started_are_an_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_HOME", "/proc/none")
    with pytest.raises((Unavailable, UsageError, OSError)):
        async with serving("bfcl"):
            pass

"""The manager's routes, and the seeds' classes over them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from serving import client, say, serving, solutions

from backends.agentscope import AsyncBFCLSandbox, BFCLSandbox
from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from serving import Client


async def called(http: Client, box: str, tool: str, twin: str = "", **arguments: Any) -> Any:
    return await http.done(f"call_tool{twin}", identity=box, tool_name=tool, arguments=arguments)


@pytest.mark.parametrize("twin", ["", "_async"])
async def test_a_box_from_its_taking_to_its_release(twin: str) -> None:
    async with serving() as made, client(made) as http:
        box = await http.done(f"create_from_pool{twin}", sandbox_type="toy", meta={"session_ctx_id": "ctx"})
        assert box.startswith("runtime_sandbox_container_")
        assert await http.done(f"get_session_mapping{twin}", session_ctx_id="ctx") == [box]
        assert await http.done(f"list_session_keys{twin}") == ["ctx"]
        assert await http.done(f"check_health{twin}", identity=box) is True
        assert await http.done(f"get_status{twin}", identity=box) == "running"
        assert "step" in (await http.done(f"list_tools{twin}", identity=box))["training"]
        assert (await called(http, box, "get_task_ids", twin, split="toy"))[0] == "toy_0"
        made_one = await called(http, box, "create_instance", twin, env_type="toy", task_id="toy_2", instance_id=None)
        name = made_one["info"]["instance_id"]
        await called(http, box, "step", twin, instance_id=name, action=say("add 3"), params={})
        assert await called(http, box, "evaluate", twin, instance_id=name, messages={}, params={}) == 1.0
        record = await http.done(f"get_info{twin}", identity=box)
        assert (record["sandbox_type"], record["instances"]) == ("toy", [name])
        other = await http.done(f"create{twin}", sandbox_type="toy")
        status, answer = await http.post(
            f"call_tool{twin}",
            identity=other,
            tool_name="step",
            arguments={"instance_id": name, "action": say("add 1")},
        )
        assert (status, answer["detail"]) == (404, f"Instance {name} not found!")  # it lies in the first box
        assert await http.done(f"release{twin}", identity=box) is True
        assert made.health()["instances"] == 0
        assert (await http.post(f"get_info{twin}", identity=box))[0] == 404
        assert await http.done(f"cleanup{twin}") is None
        assert made.health()["boxes"] == 0


@pytest.mark.parametrize(
    ("route", "body", "status", "says"),
    [
        ("create_from_pool", {"sandbox_type": "desktop"}, 400, "unknown env_type 'desktop'"),
        ("create", {"sandbox_type": "toy", "mount_dir": "/etc"}, 400, "mount_dir"),
        ("create", {"sandbox_type": "toy", "environment": {"LD_PRELOAD": "x"}}, 400, "LD_PRELOAD"),
        ("create", {"sandbox_type": "toy", "meta": {"note": "x" * 20_000}}, 400, "16384 bytes"),
        ("call_tool", {"identity": "none", "tool_name": "step"}, 404, "No container found"),
        ("call_tool", {"identity": "BOX", "tool_name": "sudo"}, 400, "unknown tool 'sudo'"),
        ("call_tool", {"identity": "BOX", "tool_name": "step", "arguments": {"x": 1}}, 400, "not 'x'"),
        ("call_tool", {"identity": "BOX", "tool_name": "step", "arguments": {}}, 400, "instance_id is required"),
        ("call_tool", {"identity": "BOX", "tool_name": "create_instance", "arguments": {}}, 400, "task_id is required"),
        ("call_tool", {"identity": "BOX", "tool_name": "step", "arguments": {"instance_id": 3}}, 400, "is a text"),
        ("call_tool", {"tool_name": "step"}, 422, "identity"),
        ("add_mcp_servers", {"identity": "BOX", "server_configs": {}}, 400, "takes no others"),
    ],
)
async def test_what_the_manager_refuses(route: str, body: dict[str, Any], status: int, says: str) -> None:
    async with serving() as made, client(made) as http:
        box = await http.done("create_from_pool", sandbox_type="toy")
        answered, answer = await http.post(route, **{k: box if v == "BOX" else v for k, v in body.items()})
        assert answered == status, answer
        assert says in answer["detail"]


async def test_the_classes_over_the_service() -> None:
    known = await solutions("bfcl", ["multi_turn_base_0"])
    async with serving("bfcl", tokens={"user": "t0ken"}) as made:
        async with AsyncBFCLSandbox(base_url=made.url, bearer_token="t0ken") as box:
            tasks = await box.get_env_profile(env_type="bfcl")
            opened = await box.create_instance(env_type="bfcl", task_id=tasks[0])
            steps = [await box.step(opened["info"]["instance_id"], action) for action in known[tasks[0]]]
            assert steps[-1]["is_terminated"]
            assert await box.evaluate(opened["info"]["instance_id"], params={"sparse": True}) == 1.0
        assert made.health()["boxes"] == 0

        def blocking() -> object:
            with BFCLSandbox(base_url=made.url, bearer_token="t0ken") as box:
                name = box.create_instance(env_type="bfcl", task_id="multi_turn_base_0")["info"]["instance_id"]
                for action in known["multi_turn_base_0"]:
                    box.step(name, action)
                return box.evaluate(name, params={"sparse": True})

        assert await asyncio.to_thread(blocking) == 1.0
        with pytest.raises(UsageError, match="another bearer_token"):
            async with AsyncBFCLSandbox(base_url=made.url, bearer_token="wrong") as box:
                await box.get_env_profile(env_type="bfcl")
    assert made.health()["instances"] == 0

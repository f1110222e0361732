"""Run by the reference's own interpreter: plays given solutions through its client classes, and prints what it saw.

Knows nothing of this project. `HOW URL`, and {task: [messages]} on standard input.
"""

import asyncio
import json
import os
import sys


def text_calls(message):
    """The same message with its calls in the text, as the reference's own agents write them."""
    calls = message.get("tool_calls") or []
    blocks = [message.get("content") or ""]
    for call in calls:
        written = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        blocks.append(f"<tool_call>\n{json.dumps(written)}\n</tool_call>")
    return {"role": "assistant", "content": "\n".join(blocks)}


def play(target, known):
    scores, reports, released = {}, {}, 0
    first = target.get_env_profile(env_type="bfcl", split="train")[0]
    for number, (task, messages) in enumerate(known.items()):
        name = target.create_instance(env_type="bfcl", task_id=task)["info"]["instance_id"]
        for message in messages:
            action = text_calls(message) if number % 2 else message
            step = target.step(instance_id=name, action=action)
        assert step["is_terminated"] is True, step
        scores[task] = target.evaluate(instance_id=name, params={"sparse": True})
        reports[task] = target.evaluate(instance_id=name)["valid"]
        released += target.release_instance(instance_id=name) is True
    return {"scores": scores, "reports": reports, "released": released, "first": first}


def by_box(url, known):
    from agentscope_runtime.sandbox.box.training_box.training_box import BFCLSandbox

    with BFCLSandbox(base_url=url, bearer_token=os.environ["BEARER"]) as box:
        assert box.get_info()["sandbox_type"] == "bfcl"
        assert "training" in box.list_tools()
        return play(box, known)


class Twins:
    """The manager's `_async` routes, by the reference's own async client."""

    def __init__(self, manager, box):
        self.manager, self.box = manager, box

    def __getattr__(self, name):
        def call(**arguments):
            return self.loop.run_until_complete(self.manager.call_tool_async(self.box, name, arguments))

        return call


def by_box_async(url, known):
    from agentscope_runtime.sandbox.manager.sandbox_manager import SandboxManager

    loop = asyncio.new_event_loop()
    manager = SandboxManager(base_url=url, bearer_token=os.environ["BEARER"])
    box = loop.run_until_complete(manager.create_from_pool_async(sandbox_type="bfcl", meta={"session_ctx_id": "c"}))
    twins = Twins(manager, box)
    twins.loop = loop
    seen = play(twins, known)
    assert loop.run_until_complete(manager.release_async(box)) is True
    loop.run_until_complete(manager.httpx_client.aclose())
    return seen


def by_client(url, known):
    from agentscope_runtime.sandbox.client import TrainingSandboxClient

    with TrainingSandboxClient(base_url=url) as client:
        return play(client, known)


if __name__ == "__main__":
    how, url = sys.argv[1:]
    known = json.load(sys.stdin)
    sys.stdout.write(json.dumps({"box": by_box, "box_async": by_box_async, "client": by_client}[how](url, known)))

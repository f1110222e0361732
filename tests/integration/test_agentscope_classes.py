"""The training sandbox's classes as their users write them: blocking, async, in threads, across forks and deaths."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backends.agentscope import (
    AsyncBFCLSandbox,
    AsyncTrainingSandbox,
    BFCLSandbox,
    SandboxRegistry,
    SandboxType,
    TrainingSandbox,
)
from backends.sandboxes.private import sweep
from orchestrator.errors import SandboxError, SandboxRefused, Unavailable, UnknownName, UsageError
from orchestrator.testing.leaks import processes


def _call(name: str, **arguments: str) -> str:
    text = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{text}}}}}\n</tool_call>'


def _says(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


FIRST_TASK = [
    _call("cd", folder="document")
    + _call("mkdir", dir_name="temp")
    + _call("mv", source="final_report.pdf", destination="temp"),
    "done",
    _call("cd", folder="temp") + _call("grep", file_name="final_report.pdf", pattern="budget analysis"),
    "done",
    _call("sort", file_name="final_report.pdf"),
    "done",
    _call("cd", folder="..")
    + _call("mv", source="previous_report.pdf", destination="temp")
    + _call("cd", folder="temp")
    + _call("diff", file_name1="final_report.pdf", file_name2="previous_report.pdf"),
    "done",
]
"""A solution of multi_turn_base_0: four turns, each ended by a message without a call."""


def servers() -> list[int]:
    """Living servers that this process started."""
    ours = str(os.getpid())
    return [
        found.pid
        for found in processes()
        if "backends.server" in found.command and found.state != "Z" and _parent(found.pid) == ours
    ]


def _parent(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1]
    except OSError:
        return ""


def _toy() -> TrainingSandbox:
    return TrainingSandbox(box_type="toy", timeout=30)


def test_bfcl_as_its_users_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASET_SUB_TYPE", "multi_turn")
    box = BFCLSandbox()
    tasks = box.get_env_profile(env_type="bfcl")
    assert tasks[0] == "multi_turn_base_0"
    assert box.get_task_ids(env_type="bfcl", split="val")[0] not in tasks
    created = box.create_instance(env_type="bfcl", task_id=tasks[0])
    instance = created["info"].pop("instance_id")
    assert created["info"] == {
        "task_id": tasks[0],
        "test_id": tasks[0],
        "tools_count": 32,
        "questions_count": 4,
    }
    assert [message["role"] for message in created["state"]] == ["system", "user"]
    assert created["state"][0]["content"].count('"function"') >= 32
    for number, words in enumerate(FIRST_TASK, 1):
        result = box.step(instance, _says(words))
        last = number == len(FIRST_TASK)
        assert set(result) == {"state", "reward", "is_terminated", "info"}
        assert (result["reward"], result["is_terminated"], result["info"]) == (float(last), last, {})
        assert [(m["role"], m["tool_calls"]) for m in result["state"]] == [("user", [])]
        if number < 7:  # then all turns have begun, and what was asked for in the last one is done
            assert box.evaluate(instance, params={"sparse": True}) == 0.0  # at any time, changing nothing
    assert box.evaluate(instance, params={"sparse": True}) == 1.0
    report = box.evaluate(instance, messages={}, params={})
    assert isinstance(report, dict)
    assert report["accuracy"] == report["correct_count"] == report["total_count"] == 1
    assert (report["test_category"], report["turn_count"], report["completed"]) == ("multi_turn_base", 3, True)
    assert box.release_instance(instance)
    assert not box.release_instance(instance)
    box.close()


def test_a_box_as_a_context() -> None:
    with _toy() as box:
        assert box.get_env_profile(split="toy:train")[:2] == ["toy_0", "toy_2"]
        record = box.get_info()
        assert (record["sandbox_type"], record["state"], record["container_name"]) == ("toy", "running", box.sandbox_id)
    with pytest.raises(UsageError, match="closed"):
        box.get_env_profile()
    box.close()


def test_what_an_instance_offers() -> None:
    with BFCLSandbox() as box:
        instance = box.create_instance("bfcl", "multi_turn_base_0", instance_id="mine")["info"]["instance_id"]
        assert instance == "mine"
        listed = box.get_info("mine").splitlines()
        assert listed[0] == "Available tools:"
        assert any(line.startswith("- grep: ") for line in listed)
        assert box.list_tools(instance_id="mine") == box.get_info("mine")
        assert set(box.list_tools()["training"]) >= {"create_instance", "step", "evaluate", "release_instance"}
        assert box.list_tools("browser") == {}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda box: box.create_instance("toy", "nothing"), SandboxRefused, "unknown task"),
        (lambda box: box.create_instance("toy", None), UsageError, "task_id"),
        (lambda box: box.create_instance("bfcl", "toy_0"), UsageError, "box_type='bfcl'"),
        (lambda box: box.create_instance("toy", "toy_0", "taken"), UsageError, "exists already"),
        (lambda box: box.create_instance("toy", "toy_0", "x" * 129), UsageError, "128"),
        (lambda box: box.create_instance("toy", "toy_0", params={"data_path": "/etc"}), UsageError, "data_path"),
        (lambda box: box.create_instance("toy", "toy_0", params=["no"]), UsageError, "params"),
        (lambda box: box.get_env_profile("toy", "tain"), UnknownName, "unknown split"),
        (lambda box: box.step("nobody", _says("stop")), UnknownName, "nobody"),
        (lambda box: box.step("taken"), UsageError, "action"),
        (lambda box: box.step("taken", {"content": object()}), UsageError, "JSON"),
        (lambda box: box.evaluate("nobody"), UnknownName, "nobody"),
        (lambda box: box.call_tool("shell", {}), UnknownName, "known: "),
        (lambda box: box.call_tool("step", {"instanceid": "x"}), UsageError, "instanceid"),
    ],
)
def test_errors_are_raised(toy_box: TrainingSandbox, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(toy_box)
    assert toy_box.step("taken", _says("add 0"))["reward"] == 0.0  # and nothing else has suffered


@pytest.fixture
def toy_box() -> Any:
    with _toy() as box:
        box.create_instance("toy", "toy_0", "taken")
        yield box


@pytest.mark.parametrize(("arguments", "words"), [((None, 0), "positive"), ((None, "http://here"), "positive")])
def test_bad_arguments(arguments: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BFCLSandbox(*arguments)
    with pytest.raises(UnknownName, match=r"known: .*appworld.*bfcl"):
        TrainingSandbox(box_type="bfc1")


def test_an_episode_that_is_over(toy_box: TrainingSandbox) -> None:
    toy_box.step("taken", _says("add 1"))
    assert toy_box.step("taken", "stop")["is_terminated"]
    with pytest.raises(UsageError, match="over"):
        toy_box.step("taken", _says("add 1"))
    assert toy_box.evaluate("taken") == 1.0


def test_a_death_between_calls_is_not_noticed(toy_box: TrainingSandbox) -> None:
    toy_box.step("taken", _says("add 5"))
    (server,) = servers()
    os.kill(server, signal.SIGKILL)
    assert "total 6" in toy_box.step("taken", _says("add 1"))["state"][0]["content"]
    assert servers() != [server]


def test_an_action_that_kills_its_sandbox(toy_box: TrainingSandbox) -> None:
    """It is the action's fault alone: it raises, and its own instance and all others go on."""
    toy_box.create_instance("toy", "toy_1", "other")
    toy_box.step("other", _says("add 3"))
    toy_box.step("taken", _says("add 2"))
    with pytest.raises(SandboxError, match="times alone"):
        toy_box.step("taken", _says("crash"))
    assert "total 3" in toy_box.step("taken", _says("add 1"))["state"][0]["content"]
    assert "total 4" in toy_box.step("other", _says("add 1"))["state"][0]["content"]


def test_a_call_that_takes_too_long() -> None:
    with TrainingSandbox(box_type="toy", timeout=1.5) as box:
        box.create_instance("toy", "toy_0", "slow")
        with pytest.raises(SandboxError, match=r"1\.5 s"):
            box.step("slow", _says("sleep 20"))
        assert "total 1" in box.step("slow", _says("add 1"))["state"][0]["content"]


def test_many_boxes_in_many_threads_share_one_server() -> None:
    together = threading.Barrier(8)

    def play(number: int) -> tuple[list[float], list[int], int]:
        with _toy() as box:
            together.wait()
            rewards = []
            for round_ in range(5):
                task = f"toy_{(number + round_) % 7}"
                instance = box.create_instance("toy", task)["info"]["instance_id"]
                box.step(instance, _says(f"add {1 + (number + round_) % 7}"))
                rewards.append(box.step(instance, _says("stop"))["reward"])
            alive, threads = servers(), sum(t.name == "training-boxes" for t in threading.enumerate())
            together.wait()
            return rewards, alive, threads

    with ThreadPoolExecutor(8) as threads:
        for rewards, alive, loops in threads.map(play, range(8)):
            assert rewards == [1.0] * 5
            assert len(alive) == 1
            assert loops == 1
    assert not servers()


def test_threads_may_share_a_box(toy_box: TrainingSandbox) -> None:
    def add(number: int) -> None:
        toy_box.step("taken", _says("add 1"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(40)))
    assert "total 40" in toy_box.step("taken", _says("add 0"))["state"][0]["content"]


def test_a_box_that_nobody_refers_to_ends() -> None:
    box = _toy().start()
    (server,) = servers()
    (thread,) = (t for t in threading.enumerate() if t.name == "training-boxes")
    del box
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert not Path(f"/proc/{server}").exists()


def test_a_fork_starts_anew_and_leaves_its_parents_box_alone(toy_box: TrainingSandbox) -> None:
    toy_box.step("taken", _says("add 5"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            instance = toy_box.create_instance("toy", "toy_0")["info"]["instance_id"]
            toy_box.step(instance, _says("add 1"))
            status = 0 if toy_box.step(instance, _says("stop"))["reward"] == 1.0 else 2
            toy_box.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "total 6" in toy_box.step("taken", _says("add 1"))["state"][0]["content"]


def test_closing_under_a_call_ends_it(toy_box: TrainingSandbox) -> None:
    with ThreadPoolExecutor(1) as threads:
        step = threads.submit(toy_box.step, "taken", _says("sleep 20"))
        while not toy_box.get_info()["calls"]:
            pass
        toy_box.close()
        with pytest.raises(UsageError, match=r"released|closed"):
            step.result(10)


def test_idle_instances_sleep_and_wake(monkeypatch: pytest.MonkeyPatch, toy_box: TrainingSandbox) -> None:
    monkeypatch.setattr("backends.agentscope.embedded.IDLE_S", 0.05)
    monkeypatch.setattr("backends.agentscope.embedded.SWEEP_S", 0.02)
    with _toy() as box:
        box.create_instance("toy", "toy_0", "idle")
        box.step("idle", "add 3")
        while box.get_info()["asleep"] != ["idle"]:
            pass
        assert "total 4" in box.step("idle", "add 1")["state"][0]["content"]


def test_a_kind_that_nothing_here_serves() -> None:
    @SandboxRegistry.register("theirs/box:latest", sandbox_type="theirs")
    class TheirBox(TrainingSandbox):
        pass

    box = TheirBox()
    with pytest.raises(Unavailable, match="base_url"):
        box.start()
    box.close()


def test_ones_own_class_for_an_environment() -> None:
    @SandboxRegistry.register("mine/toy:latest", sandbox_type="toy", timeout=9)
    class ToyBox(TrainingSandbox):
        def play(self, task: str, *words: str) -> float:
            instance = self.create_instance("toy", task)["info"]["instance_id"]
            return float([self.step(instance, said)["reward"] for said in words][-1])

    with ToyBox() as box:
        assert box.play("toy_2", "add 3", "stop") == 1.0
        assert (box.get_info()["version"], box.get_info()["timeout"]) == ("mine/toy:latest", 9)


def test_an_interrupt_ends_the_call_and_the_program() -> None:
    program = (
        "from backends.agentscope import TrainingSandbox\n"
        "box = TrainingSandbox(box_type='toy')\n"
        "box.create_instance('toy', 'toy_0', 'one')\n"
        "print('ready', flush=True)\n"
        "box.step('one', 'sleep 30')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert errors.endswith(b"KeyboardInterrupt\n")
    assert process.returncode == -signal.SIGINT


def test_a_fork_in_the_middle_of_a_call(toy_box: TrainingSandbox) -> None:
    """What another thread held at the fork is nobody's in the child."""
    with toy_box._guard:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                toy_box.create_instance("toy", "toy_0")
                status = 0
                toy_box.close()
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


ENDINGS = {
    "falls off its end": ("", 0),
    "raises": ("raise KeyError('mine')", 1),
    "exits": ("sys.exit(3)", 3),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_does_not_close_leaves_nothing(ending: str) -> None:
    last, status = ENDINGS[ending]
    program = (
        "import os, signal, sys\n"
        "from backends.agentscope import TrainingSandbox\n"
        "box = TrainingSandbox(box_type='toy')\n"
        "box.create_instance('toy', 'toy_0', 'one')\n"
        "print(box.step('one', 'add 1')['state'][0]['content'], flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + last], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "total 1\n"
    assert done.returncode == status, done.stderr
    assert ("KeyError" in done.stderr) == (ending == "raises")
    assert "Error" not in done.stderr.replace("KeyError", "")
    left = sweep()  # what a kill leaves goes with the next start
    assert bool(left) == (ending == "is killed")


IN_CONTAINERS = """
import sys
from dataclasses import replace
from backends.agentscope import TrainingSandbox, host
from backends.environments.catalog import find
host.find = lambda name: replace(find(name), runs_code=True)
assert type(host.choose(host.find("toy"))).__name__ == "DockerBackend"
box = TrainingSandbox(box_type="toy")
box.create_instance("toy", "toy_0", "one")
print(box.step("one", "add 1")["state"][0]["content"])
"""


@pytest.mark.parametrize("ending", ["", "box.close()", "sys.exit(3)"])
@pytest.mark.usefixtures("containers")
def test_where_code_runs_there_are_containers_and_none_is_left(ending: str) -> None:
    program = IN_CONTAINERS + ending
    environment = {name: value for name, value in os.environ.items() if name != "ROLLOUT_UNSAFE_LOCAL"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environment,
    )
    assert done.stdout == "total 1\n"
    assert done.stderr == ""
    assert done.returncode == (3 if ending == "sys.exit(3)" else 0)


async def test_the_async_form() -> None:
    async with AsyncBFCLSandbox() as box:
        tasks = await box.get_env_profile(env_type="bfcl")

        async def play() -> float:
            created = await box.create_instance(env_type="bfcl", task_id=tasks[0])
            instance = created["info"]["instance_id"]
            for words in FIRST_TASK:
                result = await box.step(instance, _says(words))
            assert result["is_terminated"]
            score = await box.evaluate(instance, params={"sparse": True})
            assert await box.release_instance(instance)
            assert isinstance(score, float)
            return score

        async with asyncio.TaskGroup() as group:
            plays = [group.create_task(play()) for _ in range(20)]
        assert [task.result() for task in plays] == [1.0] * 20
        assert len(servers()) == 1
        assert (await box.get_info())["instances"] == []


async def test_async_boxes_of_one_kind_share_their_sandbox() -> None:
    first, second = AsyncTrainingSandbox(box_type="toy"), AsyncTrainingSandbox(box_type=SandboxType("toy"))
    await first.create_instance("toy", "toy_0", "same")
    await second.create_instance("toy", "toy_0", "same")  # ids are a box's own
    assert len(servers()) == 1
    await first.step("same", "add 5")
    assert "total 1" in (await second.step("same", "add 1"))["state"][0]["content"]
    await first.close()
    assert "total 2" in (await second.step("same", "add 1"))["state"][0]["content"]
    await second.close()
    with pytest.raises(UsageError, match="closed"):
        await second.start()


async def test_a_name_is_taken_as_soon_as_it_is_asked_for() -> None:
    async with AsyncTrainingSandbox(box_type="toy") as box, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(box.create_instance("toy", "toy_0", "mine"))
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="exists already"):
            await box.create_instance("toy", "toy_1", "mine")
        assert (await first)["info"]["task_id"] == "toy_0"


async def test_a_cancelled_step_has_not_happened() -> None:
    async with AsyncTrainingSandbox(box_type="toy") as box:
        await box.create_instance("toy", "toy_0", "one")
        await box.step("one", "add 2")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await box.step("one", "sleep 5")
        assert "total 3" in (await box.step("one", "add 1"))["state"][0]["content"]


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    box = AsyncTrainingSandbox(box_type="toy")
    start = asyncio.create_task(box.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert (await box.get_env_profile(split="toy"))[0] == "toy_0"
    await box.close()


async def test_an_async_box_that_nobody_refers_to_ends() -> None:
    box = await AsyncTrainingSandbox(box_type="toy").start()
    (host,) = (task for task in asyncio.all_tasks() if task.get_name() == "host-toy")
    del box
    gc.collect()
    async with asyncio.timeout(10):
        await host
    assert not servers()


def test_a_loop_that_ends_takes_its_boxes_along() -> None:
    async def leave_open() -> AsyncTrainingSandbox:
        return await AsyncTrainingSandbox(box_type="toy").start()

    box = asyncio.run(leave_open())
    assert not servers()
    with pytest.raises(UsageError, match="event loop"):
        asyncio.run(box.get_info())


async def test_a_blocking_box_inside_a_running_loop() -> None:
    """As in a notebook: it has a loop of its own."""

    def play() -> str:
        with _toy() as box:
            box.create_instance("toy", "toy_0", "one")
            return str(box.step("one", "add 1")["state"][0]["content"])

    assert await asyncio.to_thread(play) == "total 1"

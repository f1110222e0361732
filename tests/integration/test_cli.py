"""The command as a user types it: real processes, the toy environment, one finished run that most tests read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import EpisodeBuffer, header
from orchestrator.store import RunMeta, schema
from orchestrator.store.commit import Committer, Row
from orchestrator.types import EpisodeKey, Observation, Outcome, RunId, StopReason, Trajectory

ROLLOUT = Path(sys.executable).with_name("rollout")
FIGURES = {
    "episodes", "outcomes", "reward_mean", "reward_one", "steps", "wall_s", "episodes_per_s", "steps_per_s",
    "cpu_us_per_step_orchestrator", "cpu_us_per_step_sandbox", "peak_rss_mb", "model_calls", "prompt_tokens",
    "completion_tokens", "recovered_episodes", "duplicates", "redelivered", "run", "out", "state",
}  # fmt: skip
BROKEN = "from nowhere import nothing\n"
DEFECT = """
from orchestrator.cli.main import main
from orchestrator.scheduler import Record, Scheduler

handle = Scheduler.handle

def broken(self, event, now):
    commands = handle(self, event, now)
    if any(isinstance(command, Record) for command in commands):
        raise KeyError("a defect")
    return commands

Scheduler.handle = broken
main()
"""


def rollout(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    environ = os.environ | {"COLUMNS": "100", "ROLLOUT_HOME": str(HOME)} | variables
    command = [str(ROLLOUT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=60, check=False)


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a redirection."""
    environ = os.environ | {"COLUMNS": "100", "ROLLOUT_HOME": str(HOME)}
    line = f"{ROLLOUT} {command}"
    return subprocess.run(line, shell=True, env=environ, capture_output=True, text=True, timeout=60, check=False)


HOME = Path()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of these tests touches the user's own environments."""
    global HOME
    HOME = tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, home: None) -> tuple[Path, dict[str, Any]]:
    """A run of every toy task twice, and what `collect --json` said of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    done = rollout("collect", "--env", "toy", "--group-size", "2", "--concurrency", "32", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Exit code 2, nothing on stdout, no traceback; what was said, as one line."""
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.replace("│", " ").split())


def played(task: str, observation: bytes, details: bytes) -> Trajectory:
    """An episode of one observation."""
    buffer = EpisodeBuffer(header("toy", "0" * 16))
    buffer.observe(Observation(observation))
    return Trajectory(
        key=EpisodeKey(task, 0, 0), attempt=1, outcome=Outcome.COMPLETED, stop_reason=StopReason.DONE, reward=1.0,
        steps=0, buffer=bytes(buffer.data), details=details,
    )  # fmt: skip


def test_collect_prints_one_object_and_nothing_else(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert summary.keys() >= FIGURES
    assert (summary["episodes"], summary["outcomes"], summary["reward_one"]) == (128, {"completed": 128}, 128)
    assert (summary["state"], summary["duplicates"], summary["out"]) == ("finished", 0, str(out))
    assert summary["steps"] > 128
    assert summary["cpu_us_per_step_orchestrator"] > 0
    assert (out / "logs" / "rollout.log").read_text(encoding="utf-8").count("answers after") >= 1


def test_resume_and_status_of_a_finished_run_say_the_same(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    for command in ("resume", "status"):
        done = rollout(command, out, "--json")
        assert done.returncode == 0
        assert json.loads(done.stdout.splitlines()[-1]) == summary
    table = rollout("status", out)
    assert "128 of exactly 1.0" in table.stdout
    assert str(out) in table.stdout


def test_a_finished_directory_is_not_used_again(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert "holds a finished run: choose another directory" in refused(rollout("collect", "--env", "toy", "--out", out))
    assert json.loads(rollout("status", out, "--json").stdout) == summary


def test_show_lists_episodes_and_reads_one(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    listed = rollout("show", out, "--limit", "5")
    assert len(listed.stdout.splitlines()) == 6
    assert "5 of 128 episodes (completed 128)" in listed.stderr
    read = rollout("show", out, "toy_3/0/1").stdout
    assert read.startswith("toy_3/0/1\ncompleted (done), reward 1, 5 steps")
    assert "Count to 4" in read
    assert read.count("assistant  action") == 5
    assert '{"total":4,"target":4}' in read
    assert rollout("show", out, "toy_3").stdout.startswith("toy_3/0/0\n")


def test_show_says_what_there_is_instead(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    assert "no episode toy_999 in" in refused(rollout("show", out, "toy_999"))
    assert "unknown outcome 'complete'; did you mean 'completed'?" in refused(
        rollout("show", out, "--outcome", "complete")
    )
    assert "0 of 128 episodes (completed 128)" in rollout("show", out, "--outcome", "poisoned").stderr
    assert "there is no run in" in refused(rollout("show", out.parent / "nowhere"))


@pytest.mark.parametrize("form", ["jsonl", "openai"])
def test_export_writes_every_key_once(finished: tuple[Path, dict[str, Any]], tmp_path: Path, form: str) -> None:
    out, _ = finished
    done = rollout("export", out, "--format", form, "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [f"toy_{task}/0/{sample}" for task in range(64) for sample in range(2)]
    assert [row["key"] for row in rows] == sorted(expected)
    assert {row["reward"] for row in rows} == {1.0}
    row = next(row for row in rows if row["key"] == "toy_3/0/0")
    if form == "openai":
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 5 + ["user"]
    else:
        assert [turn["action"]["content"] for turn in row["turns"][:-1]] == ["add 1"] * 4 + ["stop"]
        assert row["details"] == {"total": 4, "target": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_export_to_stdout_and_to_an_impossible_place(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = finished
    assert len(rollout("export", out, "--out", "-").stdout.splitlines()) == 128
    assert "cannot write" in refused(rollout("export", out, "--out", tmp_path / "none" / "rows.jsonl"))
    assert "is not one of 'jsonl', 'openai'" in refused(rollout("export", out, "--out", "-", "--format", "csv"))


def test_export_keeps_what_is_no_regular_file_and_writes_to_it(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = finished
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (tmp_path / "read").open("wb") as read, subprocess.Popen(["cat", pipe], stdout=read) as reader:
        try:
            done = rollout("export", out, "--out", pipe)
            reader.wait(30)
        finally:
            reader.kill()
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "read").read_text(encoding="utf-8").splitlines()) == 128
    assert pipe.is_fifo()
    device = tmp_path / "device"
    device.symlink_to("/dev/full")
    assert f"cannot write {device}: No space left on device" in refused(rollout("export", out, "--out", device))
    assert device.is_char_device()
    assert device.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "pipe", "read"]


def test_export_through_a_link_replaces_its_target(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = finished
    (tmp_path / "kept").mkdir()
    link, target = tmp_path / "rows.jsonl", tmp_path / "kept" / "old.jsonl"
    link.symlink_to(target)
    for before in (None, "old\n"):
        if before is not None:
            target.write_text(before, encoding="utf-8")
        assert rollout("export", out, "--out", link).returncode == 0
        assert link.is_symlink()
        assert len(target.read_text(encoding="utf-8").splitlines()) == 128
    assert [path.name for path in target.parent.iterdir()] == ["old.jsonl"]


def test_export_parses_what_a_sandbox_sent_and_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    connection = schema.create(tmp_path / "run.sqlite", RunMeta(RunId("r"), "toy", "0" * 16, 0, 0.0, {}))
    forged = b'0}\n{"key":"forged","reward":1.0,"details":0'
    bodies = [(b'{"messages":[]}', forged), (b'{"messages":[]}', b'{\n "total": 1}'), (b"\xff{", b"{}")]
    stored = [Row(played(f"toy_{number}", *body), None) for number, body in enumerate(bodies)]
    Committer(connection, tmp_path / "run.sqlite", 1).commit(stored, {})
    connection.close()
    for form, details in (("jsonl", [forged.decode(), {"total": 1}]), ("openai", [None, None])):
        done = rollout("export", tmp_path, "--format", form, "--out", "-")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["key"] for row in rows] == ["toy_0/0/0", "toy_1/0/0"], done.stderr
        assert [row.get("details") for row in rows] == details
        assert "1 episodes cannot be read and are left out, such as toy_2/0/0: environment at observe" in done.stderr


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
def test_a_result_that_cannot_be_written_is_said_with_where_it_is(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, redirect: str
) -> None:
    out, _ = finished
    run = tmp_path / "run"
    again = f"`rollout status {run} --json` prints it"
    for command, said in (
        (f"collect --env toy --episodes 4 --out {run} --json", again),
        (f"status {run}", again),
        (f"show {out}", "cannot write to stdout: "),
        (f"export {out} --out -", "cannot write to stdout: "),
        ("tasks --env toy", "cannot write to stdout: "),
    ):
        done = shell(f"{command} {redirect}")
        *_, last = done.stderr.splitlines()
        assert (done.returncode, said in last, last.startswith("rollout: cannot write to stdout: ")) == (1, True, True)
        assert "Traceback" not in done.stderr
    assert json.loads(rollout("status", run, "--json").stdout)["state"] == "finished"


@pytest.mark.parametrize("redirect", ["2> /dev/full", "2>&-", "2>&- <&-"])
def test_a_run_goes_on_where_nothing_can_be_said(tmp_path: Path, redirect: str) -> None:
    done = shell(f"collect --env toy --episodes 4 --out {tmp_path}/run --json --verbose {redirect}")
    assert (done.returncode, json.loads(done.stdout)["episodes"]) == (0, 4)


def test_a_plot_is_drawn(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = finished
    done = rollout("status", out, "--plot", tmp_path / "run.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "run.png" in done.stdout
    assert "cannot write /dev/full: No space left on device" in refused(rollout("status", out, "--plot", "/dev/full"))


def test_tasks_lists_ids_alone_on_stdout() -> None:
    done = rollout("tasks", "--env", "toy", "--split", "toy:val")
    assert done.stdout.splitlines() == [f"toy_{number}" for number in range(1, 64, 2)]
    assert "32 tasks" in done.stderr
    found = json.loads(rollout("tasks", "--env", "toy", "--json").stdout)
    assert len(found["tasks"]) == 64


def test_env_lists_and_installs() -> None:
    listed = rollout("env", "list").stdout
    assert "toy " in listed
    assert "bfcl " in listed
    assert rollout("env", "install", "toy").returncode == 0
    assert "did you mean 'bfcl'?" in refused(rollout("env", "install", "toy", "bfcll"))


def test_what_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    done = rollout("collect", "--env", "bfcl", "--no-install", "--out", tmp_path / "run")
    assert "environment 'bfcl' is not installed: run `rollout env install bfcl`" in refused(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--env", "tyo"], "unknown environment 'tyo'; did you mean 'toy'?"),
        (["--env", "toy", "--split", "nope"], "unknown split 'nope'; known: toy, toy:train, toy:val, faults"),
        (["--env", "toy", "--split", "toy:vla"], "unknown split 'toy:vla'; did you mean 'toy:val'?"),
        (["--env", "toy", "--task-id", "toy_64"], "unknown task 'toy_64'"),
        (["--env", "toy", "--policy", "reply"], "unknown policy 'reply'; did you mean 'replay'?"),
        (["--env", "toy", "--backend", "loca"], "unknown backend 'loca'; did you mean 'local'?"),
        (["--env", "toy", "--skill", "2"], "--skill: Input should be less than or equal to 1"),
        (["--env", "toy", "--concurrency", "0"], "--concurrency: Input should be greater than 0"),
        (["--env", "toy", "--model", "gpt"], "--model: Extra inputs are not permitted (it does not belong to policy"),
        (["--env", "toy", "--policy", "chat", "--model", "m"], "--base-url"),
        (["--env", "toy", "--policy", "scripted", "--script", "none.py:act"], "none.py"),
        (["--env", "toy", "--concurency", "3"], "No such option: --concurency (Possible options: --concurrency"),
        (["--env", "toy", "--durability", "never"], "is not one of 'auto', 'step', 'episode'"),
        (["--env", "toy", "--group-size", "3", "--episodes", "4"], "4 episodes are not a whole number of groups of 3"),
        (["--split", "toy"], "env: Field required (give --env"),
        (["--config", "none.yaml"], "cannot read the configuration none.yaml"),
    ],
)
def test_what_is_given_wrongly_is_said_in_a_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    assert complaint in refused(rollout("collect", "--out", "run", *arguments, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_that_could_not_begin_leaves_its_directory_usable(tmp_path: Path) -> None:
    refused(rollout("collect", "--env", "toy", "--split", "nope", "--out", tmp_path / "run"))
    again = rollout("collect", "--env", "toy", "--episodes", "4", "--out", tmp_path / "run", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["episodes"] == 4


def test_a_configuration_file_runs_and_is_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("env: toy\nepisodes: 6\ngroup_size: 3\nout: a\n", encoding="utf-8")
    first = rollout("collect", "--config", "run.yaml", "--json", cwd=tmp_path)
    assert (json.loads(first.stdout)["episodes"], (tmp_path / "a" / "run.sqlite").is_file()) == (6, True)
    second = rollout("collect", "--config", "run.yaml", "--episodes", "3", "--out", "b", "--json", cwd=tmp_path)
    assert json.loads(second.stdout)["episodes"] == 3
    (tmp_path / "run.yaml").write_text("env: toy\nepisodes: six\n", encoding="utf-8")
    assert "run.yaml:2: episodes: Input should be a valid integer" in refused(
        rollout("collect", "--config", "run.yaml", cwd=tmp_path)
    )


def test_a_script_acts_and_a_broken_one_says_where(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def act(view, ctx):\n    return 'add 1' if view.turn < 4 else 'stop'\n", "utf-8")
    done = rollout(
        "collect", "--env", "toy", "--policy", "scripted", "--script", "mine.py:act", "--task-id", "toy_3",
        "--out", "run", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(done.stdout)["reward_mean"] == 1.0
    (tmp_path / "broken.py").write_text(BROKEN, "utf-8")
    arguments = ("collect", "--env", "toy", "--policy", "scripted", "--out", "other", "--script")
    assert "nowhere" in refused(rollout(*arguments, "broken.py:act", cwd=tmp_path))
    assert "mine.py" in refused(rollout(*arguments, "mine.py:atc", cwd=tmp_path))


def test_a_run_that_cannot_play_one_episode_fails_and_says_why_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def act(view, ctx):\n    raise ValueError('no idea')\n", "utf-8")
    done = rollout(
        "collect", "--env", "toy", "--policy", "scripted", "--script", "bad.py:act", "--episodes", "8",
        "--out", "run", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    told, last = done.stderr.strip().split("\n")
    assert "toy_" in told
    assert "ValueError: no idea" in told
    first = "; the first failed at act: ValueError: no idea"
    assert last.startswith(f"not one episode could be played (policy 8){first}; see run/logs/rollout.log")
    assert json.loads(done.stdout)["reward_mean"] is None
    assert (tmp_path / "run/logs/rollout.log").read_text(encoding="utf-8").count("ValueError: no idea") >= 8
    assert "failed at act, policy: ValueError: no idea" in rollout("show", tmp_path / "run", "toy_0").stdout
    assert rollout("resume", tmp_path / "run").returncode == 0


def test_an_internal_error_is_a_line_its_traceback_is_in_the_log_and_resume_goes_on(tmp_path: Path) -> None:
    (tmp_path / "defect.py").write_text(DEFECT, "utf-8")
    command = [sys.executable, "defect.py", "collect", "--env", "toy", "--out", "run", "--json"]
    environ = os.environ | {"ROLLOUT_HOME": str(HOME)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("rollout: internal error, KeyError: 'a defect'; its traceback is in run/logs/")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in (tmp_path / "run/logs/rollout.log").read_text(encoding="utf-8")
    assert json.loads(rollout("resume", tmp_path / "run", "--json").stdout)["outcomes"] == {"completed": 64}


def test_a_run_that_python_started_is_gone_on_with_in_python(tmp_path: Path) -> None:
    schema.create(tmp_path / "run.sqlite", RunMeta(RunId("r"), "toy", "0" * 16, 0, 0.0, {})).close()
    assert "was started from Python: go on with it there" in refused(rollout("resume", tmp_path))
    assert json.loads(rollout("status", tmp_path, "--json").stdout)["state"] == "unfinished"


def test_the_default_directory_is_named_by_environment_and_time(tmp_path: Path) -> None:
    done = rollout("collect", "--env", "toy", "--episodes", "1", "--json", cwd=tmp_path)
    out = json.loads(done.stdout)["out"]
    assert out.startswith("runs/toy-")
    assert (tmp_path / out / "run.sqlite").is_file()


def test_doctor_finds_this_machine_fit_and_names_what_is_not() -> None:
    done = rollout("doctor", "--concurrency", "100000000", "--json")
    checks = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stderr
    assert checks["sqlite"]["state"] == "ok"
    assert checks["env toy"]["state"] == "ok"
    assert (checks["env bfcl"]["state"], "rollout env install bfcl" in checks["env bfcl"]["finding"]) == ("warn", True)
    assert checks["open files"]["state"] == "warn"


def test_doctor_sees_a_server_that_lost_its_orchestrator() -> None:
    waiting = f"{sys.executable} -c 'import time; time.sleep(60)' backends.server & echo $!; exec cat"
    with subprocess.Popen(["sh", "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        pid = parent.stdout.readline().strip()
        checks = json.loads(rollout("doctor", "--json").stdout)["checks"]
        parent.stdin.close()
        os.kill(int(pid), 9)
    finding = next(check for check in checks if check["what"] == "left-over servers")
    assert finding["state"] == "warn"
    assert pid in finding["finding"].split("kill -9 ")[1].rstrip("`").split()


def test_help_is_quick_and_fits_a_narrow_terminal() -> None:
    for command in ([], ["collect"], ["env"]):
        done = rollout(*command, "--help", COLUMNS="60")
        assert done.returncode == 0
        assert max(map(len, done.stdout.splitlines())) <= 60


def test_a_misspelt_command_is_answered_with_the_nearest() -> None:
    done = rollout("colect")
    assert done.returncode == 2
    assert "collect" in done.stderr

"""An environment service of AgentScope's protocol in a page of standard library, for images that tests build.

It counts: `add N` adds, an episode ends after six messages, and the grade is 1.0 for a total of 6. `crash` ends the
service, `hang` answers nothing for a minute. What it was started with is told by the task `about`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TASKS = [f"count_{number}" for number in range(32)] + ["about"]
LENGTH = 6


class Refused(Exception):
    """Answered with 400."""


class Instances:
    """All live instances: each the messages it was sent."""

    def __init__(self) -> None:
        self.live: dict[str, list[str]] = {}

    def get_env_profile(self, body: dict[str, Any]) -> object:
        if body.get("params", {}).get("split", "train") != "train":
            raise KeyError("no such split")
        return TASKS

    def create(self, body: dict[str, Any]) -> object:
        task, instance = body["task_id"], body["instance_id"]
        if task not in TASKS:
            raise Refused(f"Test case id {task!r} not found")
        self.live[instance] = []
        text = about() if task == "about" else f"count to 6 ({task})"
        return {"state": [{"role": "user", "content": text}], "info": {"instance_id": instance, "task_id": task}}

    def step(self, body: dict[str, Any]) -> object:
        said = self.of(body)
        content = str(body["messages"]["content"])
        if content == "crash":
            sys.stderr.write("crashing\n")
            sys.stderr.flush()
            os._exit(9)
        if content == "hang":
            time.sleep(60)
        said.append(content)
        answer = {"role": "user", "content": f"total {total(said)}", "tool_calls": []}
        done = len(said) >= LENGTH
        return {"state": [answer], "reward": grade(said) if done else 0.0, "is_terminated": done, "info": {}}

    def evaluate(self, body: dict[str, Any]) -> object:
        return grade(self.of(body))

    def release(self, body: dict[str, Any]) -> object:
        return self.live.pop(body["instance_id"], None) is not None

    def of(self, body: dict[str, Any]) -> list[str]:
        if body["instance_id"] not in self.live:
            raise Refused(f"Instance {body['instance_id']} not found!")
        return self.live[body["instance_id"]]


def total(said: list[str]) -> int:
    return sum(int(content.split()[1]) for content in said if content.startswith("add "))


def grade(said: list[str]) -> float:
    return float(total(said) == LENGTH)


def about() -> str:
    """How this process is walled off, and what it was given."""
    interfaces = [name for _, name in socket.if_nameindex()]
    with open("/proc/self/status", encoding="ascii") as status:
        fields = dict(line.split(":\t", 1) for line in status.read().splitlines() if ":\t" in line)
    kept = {name: fields[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
    given = {name: value for name, value in os.environ.items() if name in ("OPENAI_API_KEY", "GREETING")}
    shown = {
        "interfaces": interfaces,
        "uid": os.getuid(),
        "status": kept,
        "environ": given,
        "data": os.path.exists("/d"),
    }
    return json.dumps(shown)


class Handler(BaseHTTPRequestHandler):
    """Answers as env_service does."""

    protocol_version = "HTTP/1.1"
    instances = Instances()

    def do_GET(self) -> None:
        self.answer(200, b"OK") if self.path == "/healthz" else self.answer(404, b'{"detail": "Not Found"}')

    def do_POST(self) -> None:
        route = getattr(self.instances, self.path.strip("/"), None)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if route is None:
            return self.answer(404, b'{"detail": "Not Found"}')
        try:
            value = route(body)
        except Refused as error:
            return self.answer(400, json.dumps({"detail": str(error)}).encode())
        except Exception as error:  # noqa: BLE001  # as the original: whatever goes wrong is a 500
            return self.answer(500, json.dumps({"detail": f"Traceback\n{error!r}"}).encode())
        answer = {"success": value, "data": None} if self.path == "/release" else {"success": True, "data": value}
        return self.answer(200, json.dumps(answer).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()

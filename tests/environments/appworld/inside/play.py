"""Plays jobs, each in a forked child as a server would: a line of JSON comes in, a line with the outcome goes out.

A job is `{"task", "actions": [text], "options", "params", "state"}`: the messages are sent as assistant messages (an
object is sent as it is), then the exported state, or the one given instead, is graded in another child. An outcome is
`{"bodies", "dones", "state", "reward", "details", "opened_s"}`, or `{"fault"}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

from backends.environments.appworld.inside import environment
from backends.server.environment import EnvironmentFault


def clock() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)


def in_child(work: Any) -> Any:
    """What `work` returns, from a child that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writing, "w", encoding="utf-8") as pipe:
                json.dump(work(), pipe)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def play(env: Any, job: dict[str, Any]) -> dict[str, Any]:
    began = clock()
    session, reply = env.open(job["task"], job.get("seed", 0), job.get("options", {}))
    opened_s = clock() - began
    bodies, dones = [json.loads(reply.body)], []
    for action in job.get("actions", []):
        message = action if isinstance(action, dict) else {"role": "assistant", "content": action}
        reply = session.step(json.dumps(message).encode())
        bodies.append(json.loads(reply.body))
        dones.append(reply.done)
    outcome = {"bodies": bodies, "dones": dones, "state": session.export().decode(), "opened_s": opened_s}
    session.close()
    return outcome


def grade(env: Any, job: dict[str, Any], state: str) -> dict[str, Any]:
    given = env.grade(job["task"], 0, job.get("options", {}), state.encode(), job.get("params", {}))
    return {"reward": given.reward, "details": given.details}


def whole(env: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        if (state := job.get("state")) is not None:
            return dict(in_child(lambda: grade(env, job, state)))
        outcome = in_child(lambda: play(env, job))
        return {**outcome, **in_child(lambda: grade(env, job, outcome["state"]))}
    except EnvironmentFault as fault:
        return {"fault": fault.code}


def main() -> None:
    env = environment()
    env.preload()
    for line in iter(sys.stdin.readline, ""):
        outcome = json.dumps(whole(env, json.loads(line)))
        os.write(1, outcome.encode() + b"\n")
    os._exit(0)  # at once: taking the package down takes seconds


if __name__ == "__main__":
    main()

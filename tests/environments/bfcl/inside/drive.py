"""Carry out commands from stdin, a JSON list, and print what each gave.

    ["open", session, task, options?]   ["step", session, action]   ["evaluate", session, params?]
    ["solution", task]   ["tasks", split]   ["toolset", session]   ["state", session]

`action` is text, or a message object. `state` is the public state of a session's simulators, as text. An
EnvironmentFault gives `{"fault": code, "message": text}`; anything else that is raised ends the script.
"""

import json
import sys
import time

from playing import ENVIRONMENT

from backends.server.environment import EnvironmentFault

sessions = {}
toolsets = {}


def told(reply):
    return {**json.loads(reply.body), "reward": reply.reward, "done": reply.done}


def simulators(session):
    return sessions[session]._world.simulators


def carry_out(command, *arguments):
    match command, *arguments:
        case "open", session, task, *options:
            sessions[session], reply = ENVIRONMENT.open(task, 0, *options or [{}])
            toolsets[session] = reply.toolset
            return told(reply)
        case "step", session, action:
            action = action if isinstance(action, str) else json.dumps(action)
            started = time.process_time()
            reply = sessions[session].step(action.encode("utf-8", "surrogatepass"))
            return {**told(reply), "seconds": time.process_time() - started}
        case "evaluate", session, *params:
            grade = sessions[session].evaluate(*params or [{}])
            return {"reward": grade.reward, **grade.details}
        case "solution", task:
            return [json.loads(action) for action in ENVIRONMENT.solution(task)]
        case "tasks", split:
            listed = ENVIRONMENT.tasks(split)
            return {"ids": list(listed.ids), "left_out": dict(listed.left_out)}
        case "toolset", session:
            toolset = toolsets[session]
            return {"digest": toolset.digest, "tools": json.loads(toolset.body), "identity": id(toolset)}
        case "state", session:
            public = {
                name: {key: repr(value) for key, value in vars(simulator).items() if not key.startswith("_")}
                for name, simulator in simulators(session).items()
            }
            return json.dumps(public, sort_keys=True)
        case _:
            raise ValueError(f"unknown command {command!r}")


results = []
for line in json.load(sys.stdin):
    try:
        results.append(carry_out(*line))
    except EnvironmentFault as fault:
        results.append({"fault": fault.code, "message": str(fault)})
json.dump(results, sys.stdout)

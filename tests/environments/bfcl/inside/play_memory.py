"""Play memory tasks at random; print `[task, actions, shown, verdict, apart]` of each. Arguments: number, seed.

`shown` holds, for each action, the (role, content) of the messages that it answers, from the first of its conversation
on; `verdict` is `[valid, error_type]`; `apart` tells that a guard refused a call, which upstream would run. Most
episodes only talk, the others call the memory's functions well and badly. No string holds "(", since upstream takes
the word before it for a function's name; and no call names a function that is not there, since upstream's answer to
that is Python's.
"""

import json
import random
import sys

from playing import ENVIRONMENT, tool_calls

from backends.environments.bfcl import data
from backends.environments.bfcl.guards import MAX_MEMORY

COUNT, SEED = int(sys.argv[1]), int(sys.argv[2])
chance = random.Random(SEED)

KEYS = [
    "user_name",
    "user_age",
    "city_of_birth",
    "user_drink",
    "a",
    "b_1",
    "favourite_city_name",
    "Bad Key",
    "bad__key",
    "",
]
TEXTS = [
    "Michael",
    "thirty five",
    'It\'s "quoted", {braces} and ünïcode',
    "line\nbreak",
    "",
    "a" * 299,
    "b" * 301,
    "c" * 2001,
]
QUERIES = ["user", "user name", "CITY", "city_of city", "nothing like it", ""]
VALUES = {"key": KEYS, "value": TEXTS, "query": QUERIES, "k": [0, 1, 2, 50, -1, "two", None, 1.5]}
VALUES |= {name: [*TEXTS, "Mich", "e", "d" * 9000] for name in ("text", "old_text", "new_text")}
ODD = [7, None, ["a"], {"a": 1}, True]


def text(content):
    return json.dumps({"role": "assistant", "content": content}).encode()


def some_call(functions):
    function = chance.choice(functions)
    given = {name: chance.choice(VALUES[name]) for name in function["parameters"]["properties"]}
    match chance.randrange(10):
        case 0 if given:
            del given[chance.choice(sorted(given))]
        case 1 if given:
            given[chance.choice(sorted(given))] = chance.choice(ODD)
        case 2:
            given["invented"] = 1
    return {"name": function["name"], "arguments": given}


def some_answer(task):
    known = chance.choice(data.answer(task))
    spoiled = [
        known.upper(),
        f"{known}s",
        f"x{known}",
        known[1:],
        known.replace(" ", ""),
        known.replace(" ", "-"),
        "no",
    ]
    spelled = chance.choice([known, known, known, f"*{known}*", ", ".join(known), *spoiled])
    framed = [spelled, f"It is {spelled}.", str({"answer": spelled, "context": "so"}), "", f"{spelled}!", f"1{spelled}"]
    return chance.choice(framed)


def episode(task, chatter):
    session, reply = ENVIRONMENT.open(task, 0, {})
    functions = [tool["function"] for tool in json.loads(reply.toolset.body)]
    actions, shown = [], []
    endless = chance.random() < 0.3 and chatter
    while not reply.done:
        body = json.loads(reply.body)
        shown.append([[message["role"], message["content"]] for message in body["messages"]])
        last = session._asked
        if endless or chance.random() < chatter:
            action = tool_calls([some_call(functions) for _ in range(chance.choice([1, 1, 1, 2, 3]))])
            endless = endless and chance.random() < 0.99
        else:
            action = text(some_answer(task) if last else "Noted.")
            endless = chatter and chance.random() < 0.05
        actions.append(json.loads(action))
        reply = session.step(action)
    details = session.evaluate({}).details
    assert reply.reward == float(details["valid"])
    apart = any(str(MAX_MEMORY) in content for messages in shown for _, content in messages)
    return [task, actions, shown, [details["valid"], details.get("error_type")], apart]


TASKS = ENVIRONMENT.tasks("memory").ids
played = [episode(chance.choice(TASKS), chance.choice([0, 0, 0, 0, 0.6])) for _ in range(COUNT)]
openings = {name: ENVIRONMENT.open(f"{name}_0-customer-0", 0, {})[1] for name in ("memory_kv", "memory_rec_sum")}
toolsets = {name: json.loads(opening.toolset.body) for name, opening in openings.items()}
json.dump({"episodes": played, "toolsets": toolsets}, sys.stdout)

"""Spoil ground truths at random, play them, and print what was played with the verdict. Arguments: number, seed.

An answer is set apart where upstream's judgement is not to be had: a guard refused one of its calls (upstream would
run it), or a string holds "(" (upstream takes the word before it for a function's name and rewrites the string).
"""

import copy
import json
import random
import sys

from playing import ENVIRONMENT, Answer, verdict

from backends.environments.bfcl import guards, tasks

COUNT, SEED = int(sys.argv[1]), int(sys.argv[2])
chance = random.Random(SEED)
refusals = 0


def counted(guard):
    def counting(simulator, arguments):
        global refusals
        refusal = guard(simulator, arguments)
        refusals += refusal is not None
        return refusal

    return counting


for key, guard in guards.GUARDS.items():
    guards.GUARDS[key] = counted(guard)

TASKS = ENVIRONMENT.tasks("multi_turn").ids


def truth(task):
    calls = tasks.load(task).truth
    return [[{"name": c.name, "arguments": json.loads(c.arguments)} for c in turn] for turn in calls]


TRUTHS = {task: truth(task) for task in TASKS}
POOL: dict[str, list[dict]] = {}
for task in TASKS:
    for turn in TRUTHS[task]:
        for call in turn:
            POOL.setdefault(call["name"], []).append(call)


def documented(task):
    functions = [tool["function"] for tool in tasks.load(task).tools]
    return [f for f in functions if f["name"] in POOL] or functions


def other_value(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return chance.choice([value + 1, -value, float(value), value * 2, 0, "1", str(value), None])
        case str():
            return chance.choice([value.upper(), value + "x", value[:-1], "", " " + value, 7, [value], None])
        case list():
            return chance.choice([value[::-1], value[:-1], [*value, "more"], [], "text", None])
        case dict():
            return chance.choice([{}, {**value, "more": 1}, list(value)])
        case _:
            return chance.choice(["text", 0, True])


def drop(turns, _):
    turn = chance.choice([t for t in turns if t])
    turn.pop(chance.randrange(len(turn)))


def repeat(turns, _):
    turn = chance.choice([t for t in turns if t])
    turn.insert(chance.randrange(len(turn) + 1), copy.deepcopy(chance.choice(turn)))


def swap(turns, _):
    turn = chance.choice([t for t in turns if t])
    first, second = (chance.randrange(len(turn)) for _ in range(2))
    turn[first], turn[second] = turn[second], turn[first]


def shuffle(turns, _):
    chance.shuffle(chance.choice([t for t in turns if t]))


def change(turns, _):
    arguments = chance.choice([call for turn in turns for call in turn])["arguments"]
    if arguments:
        name = chance.choice(sorted(arguments))
        arguments[name] = other_value(arguments[name])


def omit(turns, _):
    arguments = chance.choice([call for turn in turns for call in turn])["arguments"]
    if arguments:
        del arguments[chance.choice(sorted(arguments))]


def exchange(turns, _):
    """Another value that the same function gets somewhere in the data."""
    call = chance.choice([call for turn in turns for call in turn])
    call["arguments"] = copy.deepcopy(chance.choice(POOL.get(call["name"], [call]))["arguments"])


def invent(turns, _):
    chance.choice([call for turn in turns for call in turn])["arguments"]["invented"] = 1


def rename(turns, _):
    chance.choice([call for turn in turns for call in turn])["name"] = "no_such_function"


def move(turns, _):
    turn = chance.choice([t for t in turns if t])
    call = turn.pop(chance.randrange(len(turn)))
    other = chance.choice(turns)
    other.insert(chance.randrange(len(other) + 1), call)


def insert(turns, task):
    """A call of another task to a function that this task offers."""
    turn = chance.choice(turns)
    name = chance.choice(documented(task))["name"]
    call = chance.choice(POOL.get(name, [{"name": name, "arguments": {}}]))
    turn.insert(chance.randrange(len(turn) + 1), copy.deepcopy(call))


def empty(turns, _):
    chance.choice([t for t in turns if t]).clear()


SPOILERS = [
    drop,
    repeat,
    swap,
    shuffle,
    change,
    change,
    omit,
    exchange,
    exchange,
    invent,
    rename,
    move,
    insert,
    insert,
    empty,
]


def in_steps(turn):
    """Group a turn's calls into steps, few enough for upstream's limit."""
    size = chance.choice([1, 1, 2, 3])
    size = max(size, -(-len(turn) // 20))
    return [turn[start : start + size] for start in range(0, len(turn), size)]


def spoiled(task) -> Answer:
    turns = copy.deepcopy(TRUTHS[task])
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if any(turns):
            chance.choice(SPOILERS)(turns, task)
    return [in_steps(turn) for turn in turns]


played = []
for number in range(COUNT):
    task = TASKS[number % len(TASKS)] if len(TASKS) <= COUNT else chance.choice(TASKS)
    answer = spoiled(task)
    refusals = 0
    judged = verdict(task, answer)
    rewritten = any("(" in json.dumps(call["arguments"]) for turn in answer for step in turn for call in step)
    apart = "guarded" if refusals else "rewritten" if rewritten else ""
    played.append([task, answer, judged, apart])
json.dump(played, sys.stdout)

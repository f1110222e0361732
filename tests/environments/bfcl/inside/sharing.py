"""What two sessions of one task have in common: it must be nothing that can change.

For every multi-turn task: two sessions, the solution played in the first, and every mutable object reachable from the
simulators of one compared with those of the other and with upstream's modules.
"""

import gc
import json
import sys
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from playing import ENVIRONMENT

ATOMS = (str, bytes, int, float, bool, type(None), type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)


def reachable(*roots):
    found, waiting = {}, list(roots)
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, ATOMS) or id(thing) in found:
            continue
        found[id(thing)] = thing
        waiting += gc.get_referents(thing)
    return found


def mutable(found):
    return {key for key, thing in found.items() if not isinstance(thing, tuple | frozenset)}


def module_state():
    """What upstream keeps in its modules: tables, and default values of its methods' parameters."""
    values = []
    for name, module in sorted(sys.modules.items()):
        if ".func_source_code." not in name:
            continue
        for value in vars(module).values():
            if isinstance(value, dict | list | set):
                values.append(value)
            elif isinstance(value, type) and value.__module__ == name:
                values += [f.__defaults__ for f in vars(value).values() if isinstance(f, FunctionType)]
    return values


def play(task):
    session, _ = ENVIRONMENT.open(task, 0, {})
    for action in ENVIRONMENT.solution(task)[:-1]:
        session.step(action)
    return session


for task in ENVIRONMENT.tasks("multi_turn").ids:
    ENVIRONMENT.open(task, 0, {})  # every module is imported before the comparison begins
upstream_owns = mutable(reachable(*module_state()))
before = repr([state for state in module_state() if not (isinstance(state, dict) and "-1_day" in state)])
shared, leaked, largest = [], [], 0
for task in ENVIRONMENT.tasks("multi_turn").ids:
    played, fresh = play(task), ENVIRONMENT.open(task, 0, {})[0]
    mine, other = (mutable(reachable(s._world.simulators, s._world._commons)) for s in (played, fresh))
    largest = max(largest, len(mine))
    if mine & other:
        shared.append(task)
    if (mine | other) & upstream_owns:
        leaked.append(task)
    played.evaluate({})
after = repr([state for state in module_state() if not (isinstance(state, dict) and "-1_day" in state)])
json.dump({"shared": shared, "leaked": leaked, "unchanged": before == after, "largest": largest}, sys.stdout)

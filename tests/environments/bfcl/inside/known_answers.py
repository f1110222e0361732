"""Known answers of every single-turn category, right and spoiled, judged by a session and by upstream's checker alone.

The checker gets what upstream's handler of a model with function calls makes of the message: a list of
`{name: arguments}`. Prints, by category, how many known answers are right, and every difference of the two verdicts.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import bfcl_eval
from playing import ENVIRONMENT, tool_calls

from backends.environments.bfcl import upstream

upstream.language("simple_python")  # puts the stand-in for upstream's registry of models in place
sys.modules["bfcl_eval.constants.model_config"].MODEL_CONFIG_MAPPING["m"] = SimpleNamespace(underscore_to_dot=True)

from bfcl_eval.constants.enums import Language  # noqa: E402 - behind its stand-in
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402 - behind its stand-in

DATA = Path(bfcl_eval.__file__).parent / "data"
LANGUAGES = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
chance = random.Random(3)


def load(path):
    return {entry["id"]: entry for entry in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def upstream_verdict(task, category, calls, entry, truth):
    if "relevance" in category:
        return bool(calls) == ("irrelevance" not in category)
    decoded = [{call["name"]: call["arguments"]} for call in calls]
    language = LANGUAGES.get(category, Language.PYTHON)
    try:
        return ast_checker(entry["function"], decoded, truth["ground_truth"], language, category, "m")["valid"]
    except (AttributeError, KeyError, TypeError, IndexError, NotImplementedError):
        return "raised"


def spoil(calls):
    calls = json.loads(json.dumps(calls))
    if not calls:
        return [{"name": "anything", "arguments": {}}]
    call = chance.choice(calls)
    names = sorted(call["arguments"]) or [None]
    match chance.randrange(5):
        case 0:
            calls.remove(call)
        case 1:
            calls.append(call)
        case 2:
            call["name"] += "_x"
        case 3:
            call["arguments"].pop(chance.choice(names), None)
        case 4:
            call["arguments"][chance.choice(names) or "invented"] = chance.choice(["text", 3, 2.5, [1], {"a": 1}, None])
    return calls


def session_verdict(task, calls):
    session, _ = ENVIRONMENT.open(task, 0, {})
    before = session.evaluate({})
    reply = session.step(tool_calls(calls) if calls else b'{"role": "assistant", "content": "No."}')
    after = session.evaluate({"sparse": True})
    assert (before.reward, reply.done, after.reward) == (0.0, True, reply.reward)
    return reply.reward == 1.0


def solution_calls(task):
    (action,) = ENVIRONMENT.solution(task)
    calls = json.loads(action).get("tool_calls") or []
    return [{"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])} for c in calls]


report = {}
for category in sys.argv[1:]:
    entries = load(DATA / f"BFCL_v4_{category}.json")
    truths = load(DATA / "possible_answer" / f"BFCL_v4_{category}.json")
    right = raised = 0
    differences = []
    for task in ENVIRONMENT.tasks(category).ids:
        known = solution_calls(task)
        for calls in (known, spoil(known)):
            expected = upstream_verdict(task, category, calls, entries[task], truths.get(task))
            raised += expected == "raised"
            if session_verdict(task, calls) != (expected is True):
                differences.append([task, calls, expected])
        right += session_verdict(task, known)
    report[category] = {"tasks": len(entries), "right": right, "raised": raised, "differences": differences}
json.dump(report, sys.stdout)

"""Upstream by itself, without a line of the project: its loop over calls and its whole multi-turn checker.

Upstream keeps instances (by model name), default arguments and long-context records for the life of a process. So
every answer has a model name of its own, and one that reaches such shared objects is judged in a process of its own,
forked from this one; the others are judged a few dozen to a process.
Reads `{"truths": bool, "answers": [[task, answer]]}`.
"""

import gc
import json
import os
import sys
from hashlib import blake2b
from pathlib import Path

import bfcl_eval
from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

DATA = Path(bfcl_eval.__file__).parent / "data"
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")


def load(folder):
    lines = (line for name in CATEGORIES for line in (folder / f"BFCL_v4_{name}.json").read_text().splitlines())
    return {entry["id"]: entry for entry in map(json.loads, lines)}


ENTRIES, TRUTHS = load(DATA), load(DATA / "possible_answer")
for name, path in CLASS_FILE_PATH_MAPPING.items():
    if not name.startswith(("Memory", "Web")):
        __import__(path)


def in_own_process(work):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", encoding="utf-8") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(result)


def a_few_to_a_process(work, items, few=40):
    parts = [items[start : start + few] for start in range(0, len(items), few)]
    return [result for part in parts for result in in_own_process(lambda part=part: [work(item) for item in part])]


def source(call):
    return f"{call['name']}({','.join(f'{name}={value!r}' for name, value in call['arguments'].items())})"


def judge(number, task, answer):
    decoded = [[[source(call) for call in step] for step in turn] for turn in answer]
    truth, category = TRUTHS[task]["ground_truth"], task.rpartition("_")[0]
    verdict = multi_turn_checker(decoded, truth, ENTRIES[task], category, f"alone_{number}")
    return [verdict["valid"], verdict.get("error_type")]


def reaches_shared_objects(task, answer):
    """Whether tweets are mentioned in (their mentions may be the default argument), or a long context holds records."""
    classes = ENTRIES[task]["involved_classes"]
    mentions = any(call["name"] == "mention" for turn in answer for step in turn for call in step)
    return (mentions or "TravelAPI" in classes) if "long_context" in task else mentions


def judge_all(answers):
    verdicts = {}
    together = []
    for number, (task, answer) in enumerate(answers):
        if reaches_shared_objects(task, answer):
            verdicts[number] = in_own_process(lambda number=number, pair=(task, answer): judge(number, *pair))
        else:
            together.append((number, task, answer))
    judged = a_few_to_a_process(lambda entry: judge(*entry), together)
    verdicts.update({number: verdict for (number, _, _), verdict in zip(together, judged, strict=True)})
    return [verdicts[number] for number in range(len(answers))]


def results(task):
    entry, texts = ENTRIES[task], []
    for turn in TRUTHS[task]["ground_truth"]:
        texts += execute_multi_turn_func_call(
            turn, entry["initial_config"], entry["involved_classes"], "alone", task, "long_context" in task
        )[0]
    return blake2b("\0".join(texts).encode()).hexdigest()


def all_results():
    alone = [task for task in TRUTHS if "long_context" in task]
    others = [task for task in TRUTHS if "long_context" not in task]
    found = {task: in_own_process(lambda task=task: results(task)) for task in alone}
    return found | dict(zip(others, a_few_to_a_process(results, others), strict=True))


request = json.load(sys.stdin)
gc.disable()  # a collection in each child would copy every page of this process
gc.freeze()
told = {"verdicts": judge_all(request["answers"]), "results": all_results() if request["truths"] else {}}
json.dump(told, sys.stdout)

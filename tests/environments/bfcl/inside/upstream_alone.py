"""Upstream by itself, without a line of the project: its loop over calls and its whole multi-turn checker.

Each answer is judged in a process of its own, forked from this one, because upstream keeps instances, default
arguments and long-context records for the life of a process. Reads `{"truths": bool, "answers": [[task, answer]]}`.
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
        with os.fdopen(writing, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(result)


def source(call):
    return f"{call['name']}({','.join(f'{name}={value!r}' for name, value in call['arguments'].items())})"


def judge(task, answer):
    decoded = [[[source(call) for call in step] for step in turn] for turn in answer]
    verdict = multi_turn_checker(decoded, TRUTHS[task]["ground_truth"], ENTRIES[task], task.rpartition("_")[0], "alone")
    return [verdict["valid"], verdict.get("error_type")]


def results(task):
    entry, texts = ENTRIES[task], []
    for turn in TRUTHS[task]["ground_truth"]:
        texts += execute_multi_turn_func_call(
            turn, entry["initial_config"], entry["involved_classes"], "alone", task, "long_context" in task
        )[0]
    return blake2b("\0".join(texts).encode()).hexdigest()


request = json.load(sys.stdin)
gc.disable()  # a collection in each child would copy every page of this process
gc.freeze()
json.dump(
    {
        "verdicts": [in_own_process(lambda pair=pair: judge(*pair)) for pair in request["answers"]],
        "results": {task: in_own_process(lambda task=task: results(task)) for task in TRUTHS}
        if request["truths"]
        else {},
    },
    sys.stdout,
)

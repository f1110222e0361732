"""From a bare interpreter to the first listing: how long it takes; and what playing each kind of task has imported."""

import json
import sys
import time

started = time.process_time()

from playing import ENVIRONMENT  # noqa: E402 - the import is what is measured

tasks = ENVIRONMENT.tasks("").ids
seconds = time.process_time() - started

for task in ("multi_turn_base_0", "multi_turn_base_57", "simple_java_0", "simple_python_0", "memory_kv_0-customer-0"):
    session, _ = ENVIRONMENT.open(task, 0, {})
    for action in ENVIRONMENT.solution(task):
        session.step(action)
HEAVY = {"torch", "numpy", "openai", "anthropic", "transformers", "requests", "pandas", "tree_sitter", "pydantic"}
json.dump({"tasks": len(tasks), "seconds": seconds, "heavy": sorted(HEAVY & sys.modules.keys())}, sys.stdout)

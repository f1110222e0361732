"""Open ten thousand sessions of multi_turn_base and play half a turn in each; memory a session, time a step."""

import gc
import json
import sys
import time
from pathlib import Path

from playing import ENVIRONMENT

TASKS = ENVIRONMENT.tasks("multi_turn_base").ids
FIRST = {task: ENVIRONMENT.solution(task)[0] for task in TASKS}


def pss_kib():
    gc.collect()
    return int(Path("/proc/self/smaps_rollup").read_text(encoding="ascii").split("Pss:")[1].split()[0])


warm = [ENVIRONMENT.open(task, 0, {})[0] for task in TASKS]
before = pss_kib()
live = [(ENVIRONMENT.open(task, 0, {})[0], FIRST[task]) for _ in range(50) for task in TASKS]
started = time.process_time()
for session, action in live:
    session.step(action)
spent = time.process_time() - started
json.dump({"kib_a_session": (pss_kib() - before) / len(live), "us_a_step": spent / len(live) * 1e6}, sys.stdout)

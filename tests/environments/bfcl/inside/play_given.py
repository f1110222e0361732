"""Play the answers from stdin, `[[task, answer]]`, and print each verdict as `[valid, error_type]`."""

import json
import sys

from playing import verdict

json.dump([verdict(task, answer) for task, answer in json.load(sys.stdin)], sys.stdout)

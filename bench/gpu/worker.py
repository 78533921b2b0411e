"""A process of the GPU check: python -m bench.gpu.worker MODULE FOLDER

Imports MODULE, says so, and then takes tasks from stdin, a line of JSON each: {"stage", "task", "call", "arguments"}.
`call` is a generator function of MODULE. Every dict that it yields is a row: it goes into FOLDER's results at once, and
then to stdout, as {"row": …}. {"done": true} ends a task, {"failed": "…"} the process: what a failure leaves of a CUDA
context cannot be trusted.
"""

import json
import os
import sys
import time
import traceback
from importlib import import_module

from bench.gpu import results


def main(argv=None):
    module, folder = argv or sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer):
        print(json.dumps(answer), file=answers, flush=True)

    module = import_module(module)
    say(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        label = {"stage": task["stage"], "task": task["task"]}
        begin = time.monotonic()
        try:
            for row in getattr(module, task["call"])(**task["arguments"]):
                row = label | {"status": "ok", "at": round(time.monotonic() - begin, 2)} | row
                results.append(folder, row)
                say(row=row)
        except Exception as error:
            traceback.print_exc()
            say(failed=f"{type(error).__name__}: {error}"[:1500])
            sys.stderr.flush()
            os._exit(1)  # past whatever a broken device would hang in
        say(done=True)
    os._exit(0)


if __name__ == "__main__":
    main()

"""A training that kills itself with SIGKILL at the N-th of the moments that count: a step done, a file flushed or
renamed, all after the first checkpoint.

    python tests/killed_run.py N SCRIPT --flags ...
"""

import importlib
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from utils import settings  # noqa: E402
from utils.training.trainer import Trainer  # noqa: E402


def count_down(n: int) -> None:
    left, begun = [n], [0]

    def watched(function, before: bool):
        def call(*args, **more):
            if before:
                tick()
            found = function(*args, **more)
            if not before:
                tick()
            return found

        return call

    def tick() -> None:
        left[0] -= begun[0]
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    begin = Trainer.begin

    def watched_begin(*args, **more):
        begin(*args, **more)
        begun[0] = 1

    Trainer.begin = watched_begin
    Trainer.after_step = watched(Trainer.after_step, before=True)
    os.fsync = watched(os.fsync, before=True)
    Path.replace = watched(Path.replace, before=False)


if __name__ == "__main__":
    number, script, *flags = sys.argv[1:]
    main = importlib.import_module(script)
    count_down(int(number))
    settings.run(main.main, main.parse_args(flags))

"""A training as a process of torchrun runs it on one of two nodes, and ways in which the job ends too early.

    STOP="usr1 6" torchrun ... -- tests/node_run.py SCRIPT --flags ...

STOP: `usr1 N`, at the N-th step the queue signals the batch shell (its process number is BATCH_PID); `dies N`, then all
processes of the second node are killed.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from utils import distributed, settings  # noqa: E402
from utils.training.trainer import Trainer  # noqa: E402


def usr1(trainer: Trainer) -> None:
    """All processes wait for the signal, so that it comes within an epoch."""
    if distributed.is_main():
        os.kill(int(os.environ["BATCH_PID"]), signal.SIGUSR1)
    end = time.monotonic() + 300
    while trainer.signal is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)  # for its copies, from torchrun


def dies(trainer: Trainer) -> None:
    if os.environ["GROUP_RANK"] == "1":
        for number in (os.getppid(), os.getpid()):
            os.kill(number, signal.SIGKILL)


def stop_at(how: str, n: int) -> None:
    after_step, left = Trainer.after_step, [n]

    def watched(self, *args):
        left[0] -= 1
        if left[0] == 0:
            {"usr1": usr1, "dies": dies}[how](self)
        after_step(self, *args)

    Trainer.after_step = watched


if __name__ == "__main__":
    if os.environ.get("STOP"):
        how, number = os.environ["STOP"].split()
        stop_at(how, int(number))
    script = importlib.import_module(sys.argv[1])
    settings.run(script.main, script.parse_args(sys.argv[2:]))

"""What one of several processes computes, started by torchrun or with its variables: gradients of a step, scripts as
they are, or a run whose second process ends before the others.

torchrun --nproc_per_node 2 tests/parallel_run.py gradients OUT.pt
torchrun --nproc_per_node 2 tests/parallel_run.py SCRIPT --flags ...
PORTS=5001,5002 ... tests/parallel_run.py SCRIPT --flags ... then SCRIPT --flags ...    # a port for each script
torchrun --nproc_per_node 2 tests/parallel_run.py ends killed|raises|refuses|terminated|stopped
"""

import importlib
import os
import signal
import sys
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from utils import distributed, settings  # noqa: E402

WHOLE = 6  # spots of the batch


def gradients(out: str | Path) -> None:
    """Two steps, so that the queue has entries: the second one's loss and gradients are written, as they are and with
    a gather that passes no gradient on."""
    whole = distributed.gather
    with distributed.running("cpu", "fp32") as accelerator:
        found = {"right": two_steps(accelerator)}
        with mock.patch.object(distributed, "gather", lambda rows, dim=0: whole(rows.detach(), dim)):
            found["detached"] = two_steps(accelerator)
        found["mean"] = distributed.mean({"rank": 0.1 + distributed.rank()})["rank"]
    if distributed.is_main():
        torch.save(found, out)


def two_steps(accelerator) -> dict:
    from small_stage_one import batch_of, stage_one, step_of

    model = stage_one()
    replica = accelerator.prepare(model)
    n = WHOLE // distributed.n_processes()
    own = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
    for seed in (1, 2):
        model.zero_grad()
        batch = {name: rows[own] for name, rows in batch_of(WHOLE, seed).items()}
        found = step_of(replica, batch, seed=seed, expression_weight=1.0)
        found.loss.backward()
        model.after_step(found.pair_m)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loss = distributed.mean({"loss": found.loss.item()})["loss"]
    return {"loss": loss, "queue": dict(model.queue.named_buffers()), "gradients": grads}


def refuse() -> None:
    raise ValueError("expected another file; fix: write it again")


ENDS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raises": lambda: {}["no such key"],
    "refuses": refuse,
    "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def ends(args: SimpleNamespace) -> None:
    """The first process waits for a second one that does not come."""
    distributed.TIMEOUT = timedelta(seconds=5 if args.how == "stopped" else 600)
    with distributed.running("cpu", "fp32"):
        distributed.wait()
        if distributed.rank() == 1:
            ENDS[args.how]()
        distributed.wait()


def run_script(script: str, *flags: str) -> None:
    module = importlib.import_module(script)
    settings.run(module.main, module.parse_args(list(flags)))


def run_scripts(words: list[str]) -> None:
    """One after the other; an evaluation leaves WORLD_SIZE changed."""
    size, commands = os.environ["WORLD_SIZE"], [list(part) for then, part in groupby(words, "then".__eq__) if not then]
    for command, port in zip(commands, os.environ["PORTS"].split(","), strict=True):
        os.environ |= {"WORLD_SIZE": size, "MASTER_PORT": port}
        try:
            run_script(*command)
        except SystemExit as stop:
            if stop.code:
                raise


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "ends":
        settings.run(ends, SimpleNamespace(how=rest[0], debug=False))
    elif what == "gradients":
        gradients(rest[0])
    elif "then" in rest:
        run_scripts([what, *rest])
    else:
        run_script(what, *rest)

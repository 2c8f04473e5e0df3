"""What one of several processes computes, started by torchrun or with its variables: gradients of a step, a script as
it is, or a run whose second process ends before the others.

torchrun --nproc_per_node 2 tests/parallel_run.py gradients OUT.pt [without]   # "without" gradient through the gather
torchrun --nproc_per_node 2 tests/parallel_run.py SCRIPT --flags ...
torchrun --nproc_per_node 2 tests/parallel_run.py ends killed|raises|refuses|terminated|stopped
"""

import importlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from small_stage_one import batch_of, stage_one, step_of  # noqa: E402

from utils import distributed, settings  # noqa: E402

WHOLE = 6  # spots of the batch


def gradients(out: str, gather_has_gradient: bool) -> None:
    """Two steps, so that the queue has entries: the second one's loss and gradients are written."""
    model = stage_one()
    if not gather_has_gradient:
        whole = distributed.gather
        distributed.gather = lambda rows, dim=0: whole(rows.detach(), dim)
    with distributed.running("cpu", "fp32") as accelerator:
        loss = two_steps(model, accelerator)
    if distributed.is_main():
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss, "queue": dict(model.queue.named_buffers()), "gradients": grads}, out)


def two_steps(model, accelerator) -> float:
    replica = accelerator.prepare(model)
    n = WHOLE // distributed.n_processes()
    own = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
    for seed in (1, 2):
        model.zero_grad()
        batch = {name: rows[own] for name, rows in batch_of(WHOLE, seed).items()}
        found = step_of(replica, batch, seed=seed, expression_weight=1.0)
        found.loss.backward()
        model.after_step(found.pair_m)
    return distributed.mean({"loss": found.loss.item()})["loss"]


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


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "ends":
        settings.run(ends, SimpleNamespace(how=rest[0], debug=False))
    if what == "gradients":
        gradients(rest[0], "without" not in rest)
    else:
        script = importlib.import_module(what)
        settings.run(script.main, script.parse_args(rest))

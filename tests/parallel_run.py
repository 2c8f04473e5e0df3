"""What one of several processes computes, started by torchrun: gradients of a step, or a script as it is.

torchrun --nproc_per_node 2 tests/parallel_run.py gradients OUT.pt [without]   # "without" gradient through the gather
torchrun --nproc_per_node 2 tests/parallel_run.py SCRIPT --flags ...
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from small_stage_one import batch_of, stage_one, step_of  # noqa: E402

from utils.training import arguments, distributed  # noqa: E402

WHOLE = 6  # spots of the batch


def gradients(out: str, gather_has_gradient: bool) -> None:
    """Two steps, so that the queue has entries: the second one's loss and gradients are written."""
    accelerator = distributed.start("cpu", "fp32")
    model = stage_one()
    if not gather_has_gradient:
        whole = distributed.gather
        distributed.gather = lambda rows, dim=0: whole(rows.detach(), dim)
    replica = accelerator.prepare(model)
    n = WHOLE // distributed.n_processes()
    own = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
    for seed in (1, 2):
        model.zero_grad()
        batch = {name: rows[own] for name, rows in batch_of(WHOLE, seed).items()}
        found = step_of(replica, batch, seed=seed, expression_weight=1.0)
        found.loss.backward()
        model.after_step(found.twin)
    loss = distributed.mean({"loss": found.loss.item()})["loss"]
    if distributed.is_main():
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": loss, "queue": dict(model.queue.named_buffers()), "gradients": grads}, out)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "gradients":
        gradients(rest[0], "without" not in rest)
    else:
        script = importlib.import_module(what)
        arguments.run(script.main, script.parse_args(rest))

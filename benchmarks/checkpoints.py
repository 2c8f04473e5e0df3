"""What saving costs a training of the published size: seconds of a checkpoint beside those of an epoch.

    python benchmarks/checkpoints.py --out results/checkpoints

Stage one at the published size (DeiT-B/16 at 224, six Performer blocks on 2,000 genes, queue of 4,096, random weights)
with AdamW's state takes one step of 32 spots, is saved as a training saves it, and is read again. An epoch is of the
published 75,760 spots; in it the last checkpoint is written every 1,000 steps and at the end, the best one once.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.speed import FOLDER, machine_name, put_into
from utils import settings

SPOTS, BATCH, GENES, SAVE_EVERY, REPEATS = 75_760, 32, 2_000, 1_000, 3


def parse_args(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/checkpoints"), help="the checkpoints go here: 6 GB")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def published_model(device):
    """Stage one and its optimiser; the loss of a step."""
    import torch

    from model.stage_one import StageOne, StageOneSizes

    torch.manual_seed(0)
    model = StageOne(StageOneSizes(n_genes=GENES, n_components=10)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tiles = torch.rand(BATCH, 3, 224, 224, device=device)
    bins = torch.randint(0, 6, (BATCH, GENES), device=device)
    expression = torch.randn(BATCH, 10, device=device)

    def step(number: int) -> float:
        generator = torch.Generator(device).manual_seed(number)
        with torch.autocast(device.type, torch.bfloat16):
            out = model(tiles, bins, torch.arange(BATCH, device=device), 0.4, generator, expression, 5.0)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        optimizer.step()
        model.after_step(out.pair_m)
        return out.loss.item()  # waits for the device

    return model, optimizer, step


def seconds_of(function, repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(args) -> None:
    from utils import distributed
    from utils.training import checkpoint

    device = distributed.pick_device(args.device)
    if device.type == "cpu":
        distributed.keep_freed_memory()
    model, optimizer, step = published_model(device)
    step(0)
    step_s = seconds_of(lambda: step(1), repeats=1)
    last_s = seconds_of(
        lambda: checkpoint.save_last(args.out, "stage_one", model=model.state_dict(), optimizer=optimizer.state_dict())
    )
    best_s = seconds_of(lambda: checkpoint.save(args.out / checkpoint.BEST, "stage_one", model=model.state_dict()))
    read_s = seconds_of(lambda: checkpoint.load(args.out / checkpoint.LAST, "stage_one", "--resume"), repeats=1)
    sizes = [(args.out / name).stat().st_size / 2**30 for name in (checkpoint.LAST, checkpoint.BEST)]
    n_steps = SPOTS // BATCH
    saving = (n_steps // SAVE_EVERY + 1) * last_s + best_s
    text = "\n".join(
        [
            f"`python benchmarks/checkpoints.py`, {date.today().isoformat()}, {machine_name(args.device)}.",
            "",
            "| part | seconds |",
            "| --- | --- |",
            f"| last checkpoint written and flushed, {sizes[0]:.2f} GiB | {last_s:.2f} |",
            f"| best checkpoint, {sizes[1]:.2f} GiB | {best_s:.2f} |",
            f"| last checkpoint read | {read_s:.2f} |",
            f"| step of {BATCH} spots | {step_s:.2f} |",
            f"| epoch of {SPOTS:,} spots, {n_steps:,} steps | {n_steps * step_s:,.0f} |",
            f"| saving in it ({n_steps // SAVE_EVERY + 1} x last, best) | {saving:.1f} |",
            "",
            f"Saving takes {saving / (n_steps * step_s):.2%} of an epoch here (target: under 2 %); it would be 2 % "
            f"where a step takes {saving / 0.02 / n_steps:.2f} s.",
        ]
    )
    print(text)
    put_into(FOLDER / "RESULTS.md", "checkpoints", text)


if __name__ == "__main__":
    settings.run(main, parse_args())

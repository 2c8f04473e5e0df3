"""What the frozen blocks of the gene encoder give: the same in every epoch, so it may be kept on disk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from utils.files.arrays import ArrayStore


def outputs(encoder: Any, bins: np.ndarray, accelerator: Any, args: Any) -> np.ndarray | None:
    """Bins (n, G) of all train spots -> (n, G, W), bf16 seen as int16, in a file of --out that has no name.

    None where nothing is frozen or --frozen_budget does not hold it: the blocks are then run in every step.
    """
    shape = (*bins.shape, args.gene_width)
    size_gib = math.prod(shape) * 2 / 2**30
    if not (encoder.n_frozen and args.frozen_budget):
        return None
    if size_gib > args.frozen_budget:
        print(f"frozen blocks run in every step: what they give needs a --frozen_budget of {size_gib:.1f} GiB")
        return None
    print(f"what {encoder.n_frozen} frozen blocks give for {len(bins)} spots is kept in {args.out}: {size_gib:.1f} GiB")
    kept = ArrayStore(0, args.out).empty(shape, np.int16)
    for first in range(0, len(bins), args.batch_size):
        some = slice(first, first + args.batch_size)
        with accelerator.autocast():
            hidden = encoder.frozen_part(torch.from_numpy(bins[some]).to(accelerator.device))
        kept[some] = hidden.bfloat16().cpu().view(torch.int16).numpy()
    return kept

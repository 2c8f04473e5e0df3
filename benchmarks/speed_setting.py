"""A measurement of speed.py: its sizes, its side, the work that is timed, and the machine as the scripts set it up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import distributed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Of the models and of the sets measured."""

    image_encoder: str = "deit_base_patch16_224.fb_in1k"
    image_size: int = 224
    n_genes: int = 2000
    depth: int = 6
    gene_width: int = 200
    heads: int = 10
    spots: int = 1000  # of the slice that retrieval is evaluated on
    tiles: int = 4096  # that are loaded
    tiled: int = 4992  # spots of the slice that is cut
    gallery: int = 1_000_000


SMALL = Sizes("vit_tiny_patch16_224", 96, 500, 2, 200, 10, 100, 256, 500, 50_000)


@dataclass(frozen=True)
class Setting:
    """One side of a measurement, ours or the plain one."""

    sizes: Sizes
    plain: bool
    device: str
    batch_size: int
    seed: int
    clock: str = "wall"

    def now(self) -> float:
        """Seconds: wall clock, or those that all threads of the process have computed."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Work:
    """`run` gives the seconds of the whole part, `items` of `unit` in it; `note` says what was timed and scaled."""

    run: Callable[[], float]
    items: int
    unit: str
    note: str = ""


class Machine:
    """Device and precision as the scripts choose them; the plain side is fp32, with the allocator's defaults."""

    def __init__(self, setting: Setting):
        import torch

        torch.manual_seed(setting.seed)
        self.plain, self.now = setting.plain, setting.now
        if setting.plain:
            self.device = distributed.pick_device(setting.device)
        else:
            self.accelerator = distributed.start(setting.device, "auto")
            self.device = self.accelerator.device

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plain else self.accelerator.autocast()

    def decoder_autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plain else distributed.decoder_autocast(self.accelerator, "auto")

    def timed(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = self.now()
        function()
        self.wait()
        return self.now() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def tiles(self, n: int, size: int) -> Tensor:
        import torch

        return torch.rand(n, 3, size, size).to(self.device)

    def bins(self, n: int, n_genes: int) -> Tensor:
        import torch

        return torch.randint(0, 6, (n, n_genes), dtype=torch.uint8).to(self.device)

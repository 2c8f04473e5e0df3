"""The parts of speed.py: what each measures, plainly and as the scripts do it, on the same inputs.

A part is a function of a Setting that prepares all it needs and gives a Work, whose `run` measures it once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from model import losses
from model.gene_encoder import GeneEncoder
from model.stage_one import StageOne, StageOneSizes
from model.stage_two import StageTwo, StageTwoSizes
from utils.training import distributed

N_TARGETS, N_CONTEXT, N_EPOCHS, N_STAGE_TWO = 300, 18, 100, 1000


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
    gallery: int = 1_000_000


SMALL = Sizes("vit_tiny_patch16_224", 96, 500, 2, 200, 10, 100, 50_000)


@dataclass(frozen=True)
class Setting:
    """One side, "plain" or "ours", of a measurement."""

    sizes: Sizes
    side: str
    device: str
    batch_size: int
    seed: int

    @property
    def plainly(self) -> bool:
        return self.side == "plain"


@dataclass(frozen=True)
class Work:
    """`run` gives the seconds of the whole part, `items` of `unit` in it; `note` says what was timed and scaled."""

    run: Callable[[], float]
    items: int
    unit: str
    note: str = ""
    flop_of: Callable[[], Any] | None = None  # what a FLOP counter watches: all items, plainly


class Machine:
    """Device and precision as the scripts choose them; the plain side is fp32, with the allocator as it comes."""

    def __init__(self, setting: Setting):
        torch.manual_seed(setting.seed)
        self.plainly = setting.plainly
        if setting.plainly:
            self.device = distributed.pick_device(setting.device)
        else:
            self.accelerator = distributed.start(setting.device, "auto")
            self.device = self.accelerator.device

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.plainly else self.accelerator.autocast()

    def timed(self, work: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tiles(self, n: int, size: int) -> Tensor:
        return torch.rand(n, 3, size, size).to(self.device)

    def bins(self, n: int, n_genes: int) -> Tensor:
        return torch.randint(0, 6, (n, n_genes), dtype=torch.uint8).to(self.device)


def stage_one(setting: Setting, machine: Machine) -> StageOne:
    s = setting.sizes
    sizes = StageOneSizes(
        s.n_genes, s.image_encoder, s.image_size, gene_depth=s.depth, gene_width=s.gene_width, gene_heads=s.heads
    )
    model = StageOne(sizes).to(machine.device)
    return plain.plain_model(model) if setting.plainly else model


def gene_encoder(setting: Setting) -> Work:
    """Forward pass of the gene encoder, a batch."""
    s, machine = setting.sizes, Machine(setting)
    model = GeneEncoder(s.n_genes, s.depth, s.gene_width, s.heads).to(machine.device).eval()
    model = plain.plain_gene_encoder(model) if setting.plainly else model
    bins = machine.bins(setting.batch_size, s.n_genes)

    @torch.no_grad()
    def forward(bins: Tensor) -> None:
        with machine.autocast():
            model.encode(bins)

    return Work(lambda: machine.timed(lambda: forward(bins)), len(bins), "spots", flop_of=lambda: model.encode(bins))


def stage_one_step(setting: Setting) -> Work:
    """Forward, backward and optimiser, everything trained; ours with twins, queue and distillation."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tiles, bins = machine.tiles(setting.batch_size, s.image_size), machine.bins(setting.batch_size, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)
    spots = torch.arange(len(tiles), device=machine.device)

    def step(tiles: Tensor, bins: Tensor) -> None:
        optimizer.zero_grad()
        if setting.plainly:
            plain.stage_one_loss(model, tiles, bins, draws).backward()
            optimizer.step()
            return
        with machine.autocast():
            out = model(tiles, bins, spots, 0.4, draws)
        out.loss.backward()
        optimizer.step()
        model.after_step(out.twin)

    return Work(
        lambda: machine.timed(lambda: step(tiles, bins)), len(tiles), "spots", flop_of=lambda: step(tiles, bins)
    )


def stage_one_eval(setting: Setting) -> Work:
    """Validation: plainly the whole model's loss batch by batch, as published; ours every side once, and ranks."""
    from utils.evaluation import retrieval

    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).eval()
    n = 4 * setting.batch_size
    tiles, bins = machine.tiles(n, s.image_size), machine.bins(n, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)

    @torch.no_grad()
    def evaluate() -> None:
        if setting.plainly:
            for some in torch.arange(n).split(setting.batch_size):
                plain.stage_one_loss(model, tiles[some], bins[some], draws)
            return
        image, gene = (x.cpu().numpy() for x in encode_all(model, tiles, bins, machine))
        retrieval.ranks_from_embeddings(image, gene)
        retrieval.ranks_from_embeddings(gene, image)

    return Work(lambda: machine.timed(evaluate), n, "spots")


@torch.no_grad()
def encode_all(model: StageOne, tiles: Tensor, bins: Tensor, machine: Machine) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures and profiles, 32 at a time as the scripts do."""
    image, gene = [], []
    for start in range(0, len(tiles), 32):
        with machine.autocast():
            image.append(model.encode_images(tiles[start : start + 32])[0])
            gene.append(model.encode_genes(bins[start : start + 32])[0])
    return torch.cat(image), torch.cat(gene)


def stage_two(setting: Setting) -> Work:
    """100 epochs of 1,000 spots: plainly the frozen encoder in every step, ours on features computed once."""
    machine, n = Machine(setting), 32
    model, around = stage_two_model(setting, machine, n)
    model.train()
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-4)
    tiles, target = machine.tiles(n, setting.sizes.image_size), torch.randn(n, N_TARGETS, device=machine.device)
    steps = N_STAGE_TWO // n * N_EPOCHS
    features = model.encode(tiles).float()

    def decode() -> None:
        predicted = model.decoder(features[:, 0], features[:, 1:], **around)  # in fp32 on a CPU, as train_decoder.py
        optimizer.zero_grad()
        losses.expression_loss(predicted, target).backward()
        optimizer.step()

    def encode() -> None:
        with machine.autocast():
            model.encode(tiles)

    if setting.plainly:
        step = partial(plain.stage_two_step, model, tiles, around, target, optimizer)
        return Work(lambda: machine.timed(step) * steps, N_STAGE_TWO * N_EPOCHS, "spots", "one step of 32, scaled")
    return Work(
        lambda: (
            machine.timed(encode) * N_STAGE_TWO / n + machine.timed(lambda: [decode() for _ in range(5)]) / 5 * steps
        ),
        N_STAGE_TWO * N_EPOCHS,
        "spots",
        "one batch of 32 encoded and five steps, scaled",
    )


def stage_two_model(setting: Setting, machine: Machine, n: int) -> tuple[StageTwo, dict[str, Tensor]]:
    """The published sizes around a new encoder, and a context for n spots."""
    s = setting.sizes
    model = StageTwo(StageTwoSizes(N_TARGETS, s.image_encoder, s.image_size)).to(machine.device)
    around = {
        "context": torch.randn(n, N_CONTEXT, model.sizes.width, device=machine.device),
        "offsets": torch.randn(n, N_CONTEXT, 2, device=machine.device),
        "present": torch.ones(n, N_CONTEXT, dtype=torch.bool, device=machine.device),
    }
    return plain.plain_model(model) if setting.plainly else model, around


def prediction(setting: Setting) -> Work:
    """From tiles to genes: plainly one picture at a time, ours 32."""
    machine, n = Machine(setting), 8 if setting.plainly else 64
    model, around = stage_two_model(setting, machine, n)
    model.eval()
    tiles = machine.tiles(n, setting.sizes.image_size)

    @torch.no_grad()
    def predict() -> None:
        for start in range(0, n, 32):
            with machine.autocast():
                features = model.encode(tiles[start : start + 32])
                own = {name: rows[start : start + 32] for name, rows in around.items()}
                model.predict({"vector": features[:, 0], "tokens": features[:, 1:], **own})

    if setting.plainly:
        return Work(
            lambda: machine.timed(lambda: plain.predict(model, tiles, around)) * 8, 64, "spots", "8 of 64 tiles"
        )
    return Work(lambda: machine.timed(predict), n, "spots")

"""The parts of speed.py that are models: each by plain.py and as the scripts do it, on equal inputs."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.speed_setting import Machine, Setting, Work
from model import losses
from model.gene_encoder import GeneEncoder
from model.stage_one import StageOne, StageOneSizes
from model.stage_two import StageTwo, StageTwoSizes
from utils.evaluation.retrieval import neighbour_candidates, ranks_from_embeddings

N_TARGETS, N_CONTEXT, N_EPOCHS, N_STAGE_TWO = 300, 18, 100, 1000


def gene_encoder(setting: Setting) -> Work:
    """Forward pass of the gene encoder, a batch."""
    s, machine = setting.sizes, Machine(setting)
    model = GeneEncoder(s.n_genes, s.depth, s.gene_width, s.heads).to(machine.device).eval()
    model = plain.plain_gene_encoder(model) if setting.plain else model
    bins = machine.bins(setting.batch_size, s.n_genes)

    @torch.no_grad()
    def forward(bins: Tensor) -> None:
        with machine.autocast():
            model(bins)

    return Work(lambda: machine.timed(lambda: forward(bins)), len(bins), "spots")


def stage_one(setting: Setting, machine: Machine) -> StageOne:
    s = setting.sizes
    sizes = StageOneSizes(
        s.n_genes, s.image_encoder, s.image_size, gene_depth=s.depth, gene_width=s.gene_width, gene_heads=s.heads
    )
    model = StageOne(sizes).to(machine.device)
    return plain.plain_model(model) if setting.plain else model


def stage_one_step(setting: Setting) -> Work:
    """Forward, backward and optimiser, everything trained; ours with momentum encoders, queue and distillation."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tiles, bins = machine.tiles(setting.batch_size, s.image_size), machine.bins(setting.batch_size, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)
    spots = torch.arange(len(tiles), device=machine.device)

    def step(tiles: Tensor, bins: Tensor) -> None:
        optimizer.zero_grad()
        if setting.plain:
            plain.stage_one_loss(model, tiles, bins, draws).backward()
            optimizer.step()
            return
        with machine.autocast():
            out = model(tiles, bins, spots, 0.4, draws)
        out.loss.backward()
        optimizer.step()
        model.after_step(out.pair_m)

    return Work(lambda: machine.timed(lambda: step(tiles, bins)), len(tiles), "spots")


def stage_one_eval(setting: Setting) -> Work:
    """Validation: the plain side computes the whole loss by batch, as published; ours encodes once and ranks."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).eval()
    n = 4 * setting.batch_size
    tiles, bins = machine.tiles(n, s.image_size), machine.bins(n, s.n_genes)
    draws = torch.Generator(machine.device).manual_seed(setting.seed)

    @torch.no_grad()
    def evaluate() -> None:
        if setting.plain:
            for batch in torch.arange(n).split(setting.batch_size):
                plain.stage_one_loss(model, tiles[batch], bins[batch], draws)
            return
        image, gene = (x.cpu().numpy() for x in encode_all(model, tiles, bins, machine)[:2])
        ranks_from_embeddings(image, gene)
        ranks_from_embeddings(gene, image)

    return Work(lambda: machine.timed(evaluate), n, "spots")


@torch.no_grad()
def encode_all(model: StageOne, tiles: Tensor, bins: Tensor, machine: Machine) -> list[Tensor]:
    """Unit vectors of images and profiles, then their tokens, 32 at a time as the scripts do."""
    batches = []
    for start in range(0, len(tiles), 32):
        with machine.autocast():
            image, image_tokens = model.encode_images(tiles[start : start + 32])
            gene, gene_tokens = model.encode_genes(bins[start : start + 32])
        batches.append((image, gene, image_tokens, gene_tokens))
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def retrieval(setting: Setting) -> Work:
    """Scores of nine candidates of each of 1,000 spots; the plain side encodes each profile anew for each image."""
    s, machine = setting.sizes, Machine(setting)
    model = stage_one(setting, machine).eval()
    tiles, bins = machine.tiles(s.spots, s.image_size), machine.bins(s.spots, s.n_genes)
    side = int(np.ceil(s.spots**0.5))
    xy = np.column_stack(np.divmod(np.arange(s.spots), side)).astype(float)
    candidates = neighbour_candidates(xy, 8, setting.seed).candidates
    if setting.plain:
        sample = torch.from_numpy(candidates[:2])
        score = partial(plain.retrieval_scores, model, tiles, bins, sample)
        return Work(lambda: machine.timed(score) * s.spots / len(sample), s.spots, "spots", f"2 of {s.spots} spots")
    return Work(lambda: machine.timed(lambda: score_all(model, tiles, bins, candidates, machine)), s.spots, "spots")


@torch.no_grad()
def score_all(model: StageOne, tiles: Tensor, bins: Tensor, candidates: np.ndarray, machine: Machine) -> None:
    """All scores of a gallery as get_accuracy_image.py computes them."""
    import get_accuracy_image
    from utils.features.cache import EncodedPairs

    image, gene, image_tokens, gene_tokens = (x.cpu() for x in encode_all(model, tiles, bins, machine))
    encoded = EncodedPairs(image.numpy(), gene.numpy(), image_tokens, gene_tokens)
    depth = np.zeros(len(tiles))
    get_accuracy_image.gallery_scores(model, encoded, depth, depth, candidates, 1.0, machine.accelerator)


def stage_two_model(setting: Setting, machine: Machine, n: int) -> tuple[StageTwo, dict[str, Tensor]]:
    """The published sizes around a new encoder, and a context for n spots."""
    s = setting.sizes
    model = StageTwo(StageTwoSizes(N_TARGETS, s.image_encoder, s.image_size)).to(machine.device)
    width = model.n_vectors * model.sizes.width
    around = {
        "context": torch.randn(n, N_CONTEXT, width, device=machine.device),
        "smoothed": torch.randn(n, len(model.sizes.bandwidths), width, device=machine.device),
        "offsets": torch.randn(n, N_CONTEXT, 2, device=machine.device),
        "present": torch.ones(n, N_CONTEXT, dtype=torch.bool, device=machine.device),
    }
    return plain.plain_model(model) if setting.plain else model, around


def stage_two(setting: Setting) -> Work:
    """100 epochs of 1,000 spots: the plain side runs the frozen encoder in every step, ours reads features."""
    machine, n = Machine(setting), 32
    model, around = stage_two_model(setting, machine, n)
    model.train()
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-4)
    tiles, target = machine.tiles(n, setting.sizes.image_size), torch.randn(n, N_TARGETS, device=machine.device)
    steps = N_STAGE_TWO // n * N_EPOCHS
    features = model.encode(tiles).float()

    def decode() -> None:
        for _ in range(5):
            with machine.decoder_autocast():
                predicted = model.decoder(**model.split(features), **around)
            optimizer.zero_grad()
            losses.expression_loss(predicted, target).backward()
            optimizer.step()

    def encode() -> None:
        with machine.autocast():
            model.encode(tiles)

    def ours() -> float:
        return machine.timed(encode) * N_STAGE_TWO / n + machine.timed(decode) / 5 * steps

    step, n_spots = partial(plain.stage_two_step, model, tiles, around, target, optimizer), N_STAGE_TWO * N_EPOCHS
    if setting.plain:
        return Work(lambda: machine.timed(step) * steps, n_spots, "spots", "one step of 32, scaled")
    return Work(ours, n_spots, "spots", "one batch of 32 encoded and five steps, scaled")


def prediction(setting: Setting) -> Work:
    """From tiles to genes: the plain side one image at a time, ours 32."""
    machine, n = Machine(setting), 8 if setting.plain else 64
    model, around = stage_two_model(setting, machine, n)
    model.eval()
    tiles = machine.tiles(n, setting.sizes.image_size)

    @torch.no_grad()
    def predict() -> None:
        for start in range(0, n, 32):
            with machine.autocast():
                features = model.encode(tiles[start : start + 32]).float()
            context = {name: rows[start : start + 32] for name, rows in around.items()}
            with machine.decoder_autocast():
                model.predict(model.split(features) | context)

    if setting.plain:
        one_by_one = partial(plain.predict, model, tiles, around)
        return Work(lambda: machine.timed(one_by_one) * 8, 64, "spots", "8 of 64 tiles")
    return Work(lambda: machine.timed(predict), n, "spots")

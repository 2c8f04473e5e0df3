"""What device.py counts, checks and times: a step of each stage, the evaluation's and the prediction's encoders, as the
scripts run them on a device, on arrays made here. Letters: B batch, G input genes, Z tile side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model import losses, tuning
from model.stage_one import StageOne, StageOneSizes
from model.stage_two import StageTwo, StageTwoSizes
from utils.settings import OptimizerSettings
from utils.training import loop

Autocast = Callable[[], AbstractContextManager[None]]
TUNED_BLOCK = 4  # of the gene encoder's six, as with released weights
RATES = OptimizerSettings(Init_lr=1e-4, Min_lr=1e-6, momentum=0.9, weight_decay=1e-2, lr_decay_type="cos")
N_TARGETS, N_CONTEXT, N_TOKENS = 300, 18, 16


@dataclass(frozen=True)
class Sizes:
    """Of the models, of what of them trains, and of a batch."""

    image_encoder: str = "deit_base_patch16_224.fb_in1k"
    image_size: int = 224
    tune: str = "all"
    n_genes: int = 2000
    gene_depth: int = 6
    gene_width: int = 200
    gene_heads: int = 10
    width: int = 512
    queue_size: int = 4096
    distil: bool = True  # momentum encoders, their queue and soft targets
    batch_size: int = 32


SMALL = Sizes("test_vit", 32, "all", 50, 2, 16, 1, 32, 16, True, 4)


@dataclass(frozen=True)
class Work:
    """`run` does one batch of `n_spots`; `compiled` prepares it to be run by torch.compile from then on."""

    run: Callable[[], object]
    n_spots: int
    model: nn.Module
    compiled: Callable[[], None]


def stage_one_model(sizes: Sizes) -> StageOne:
    """Stage one with the gene encoder's trunk frozen but for one block, and the image trunk as --tune says."""
    s = sizes
    model = StageOne(
        StageOneSizes(
            s.n_genes,
            s.image_encoder,
            s.image_size,
            gene_depth=s.gene_depth,
            gene_width=s.gene_width,
            gene_heads=s.gene_heads,
            width=s.width,
            queue_size=s.queue_size if s.distil else 0,
            momentum_encoders=s.distil,
            n_components=10,
        )
    )
    model.gene_encoder.freeze_trunk(min(TUNED_BLOCK, s.gene_depth - 1))
    tuning.tune(model.image_encoder, s.tune)
    model.reset_momentum_encoders()
    return model.train()


def batch_of(sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """The arguments of StageOne.forward that a data set gives, drawn on the host, so that they are the same on any
    device."""
    b, z = sizes.batch_size, sizes.image_size
    drawn = torch.Generator().manual_seed(0)
    rows = {
        "tiles": torch.rand(b, 3, z, z, generator=drawn),
        "bins": torch.randint(0, 6, (b, sizes.n_genes), generator=drawn, dtype=torch.uint8),
        "expression": torch.randn(b, 10, generator=drawn),
        "spots": torch.arange(b),
    }
    return {name: tensor.to(device) for name, tensor in rows.items()}


def stage_one(model: StageOne, sizes: Sizes, device: torch.device, autocast: Autocast) -> Work:
    """A training step: forward, backward, optimiser, momentum encoders, queue."""
    optimizer = loop.make_optimizer(model.parameters(), RATES)
    batch, draws = batch_of(sizes, device), torch.Generator()

    def step() -> Tensor:
        with autocast():
            out = model(**batch, alpha=0.4 * sizes.distil, generator=draws, expression_weight=5.0)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step(out.pair_m)
        return out.loss.detach()

    return Work(step, sizes.batch_size, model, lambda: model.compile_encoders(sizes.batch_size))


def evaluation(model: StageOne, sizes: Sizes, device: torch.device, autocast: Autocast) -> Work:
    """Vectors and tokens of images and profiles, and nine candidates of each image by the fusion."""
    batch = batch_of(sizes, device)

    @torch.no_grad()
    def encode() -> Tensor:
        model.eval()
        with autocast():
            _, image_tokens = model.encode_images(batch["tiles"])
            _, gene_tokens = model.encode_genes(batch["bins"])
            genes, images = model.fusion.precompute_genes(gene_tokens), model.fusion.precompute_images(image_tokens)
            return model.fusion.score(genes[:, None].expand(-1, 9, -1, -1), images)

    return Work(encode, sizes.batch_size, model, lambda: model.compile_encoders(sizes.batch_size))


def stage_two_model(sizes: Sizes) -> StageTwo:
    landmarks = min(2000, 10 * sizes.batch_size)
    model = StageTwo(
        StageTwoSizes(N_TARGETS, sizes.image_encoder, sizes.image_size, width=sizes.width, landmarks=landmarks)
    )
    return model.train()


def features_of(model: StageTwo, n: int, device: torch.device) -> dict[str, Tensor]:
    """What FeatureBank gives for n spots."""
    width, bandwidths = model.n_vectors * model.sizes.width, len(model.sizes.bandwidths)
    return {
        "vector": torch.randn(n, width, device=device),
        "tokens": torch.randn(n, N_TOKENS, model.sizes.width, device=device),
        "context": torch.randn(n, N_CONTEXT, width, device=device),
        "offsets": torch.randn(n, N_CONTEXT, 2, device=device),
        "present": torch.ones(n, N_CONTEXT, dtype=torch.bool, device=device),
        "smoothed": torch.randn(n, bandwidths, width, device=device),
    }


def stage_two(model: StageTwo, sizes: Sizes, device: torch.device, autocast: Autocast) -> Work:
    """A training step of the decoder on kept features."""
    optimizer = loop.make_optimizer(model.decoder.parameters(), RATES)
    batch = features_of(model, sizes.batch_size, device)
    target = torch.randn(sizes.batch_size, N_TARGETS, device=device)

    def step() -> Tensor:
        with autocast():
            predicted = model.decoder(**batch)
        loss = losses.expression_loss(predicted, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Work(step, sizes.batch_size, model, model.decoder.compile)


def prediction(model: StageTwo, sizes: Sizes, device: torch.device, autocast: Autocast) -> Work:
    """Features of tiles, and genes from features."""
    tiles, batch = batch_of(sizes, device)["tiles"], features_of(model, sizes.batch_size, device)

    @torch.no_grad()
    def predict() -> Tensor:
        model.eval()
        with autocast():
            model.encode(tiles)
            return model.predict(batch)

    def compiled() -> None:
        model.image_encoder.trunk.compile()
        model.decoder.compile()

    return Work(predict, sizes.batch_size, model, compiled)


PARTS: dict[str, tuple[Callable, Callable]] = {
    "stage_one": (stage_one_model, stage_one),
    "evaluation": (stage_one_model, evaluation),
    "stage_two": (stage_two_model, stage_two),
    "prediction": (stage_two_model, prediction),
}


def of_batch(sizes: Sizes, batch_size: int) -> Sizes:
    return replace(sizes, batch_size=batch_size)

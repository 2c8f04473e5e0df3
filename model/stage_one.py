"""Stage one: image and gene encoder, their momentum encoders, contrastive loss, and matching by fusion.

After Li et al. 2021 (ALBEF), arXiv 2107.07651. Letters: B batch, G input genes, D shared width, K gene tokens, P image
tokens, Z tile side in pixels, R components of expression. The suffix _m marks momentum encoders and their features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import losses
from model.contrastive import ContrastiveHead, Pair
from model.fusion import N_NEGATIVES, Fusion, draw_negatives
from model.gene_encoder import GeneEncoder
from model.image_encoder import ImageEncoder, Weights
from model.momentum import FeatureQueue, HostNumbers, momentum_at, momentum_encoder, update_momentum
from utils import distributed

FrozenParts = tuple[Tensor | None, Tensor | None]  # of images (scales * B, P, C) and of genes (B, G, W), C, W widths


@dataclass(frozen=True)
class StageOneSizes:
    """What must be known to build the model before its weights are loaded; kept in the checkpoint."""

    n_genes: int
    image_encoder: str = "deit_base_patch16_224.fb_in1k"
    image_size: int = 224
    image_pretrained: bool = False
    crop_scales: Sequence[float] = (1.0,)
    gene_depth: int = 6
    gene_width: int = 200
    gene_heads: int = 10
    gene_tokens: int = 64
    fusion_blocks: int = 3
    image_tokens: int = 50
    width: int = 512
    queue_size: int = 4096
    momentum_encoders: bool = True  # needed by the queue, and by distillation (alpha > 0)
    n_components: int = 0  # of expression, to regress from both vectors; 0 for none


class StepOutput(NamedTuple):
    """Losses of one batch, and the features that enter the queue after the step."""

    loss: Tensor
    contrast: Tensor
    matching: Tensor
    expression: Tensor
    matching_auc: Tensor
    pair_m: Pair


def gather_pair(image: Tensor, gene: Tensor, spots: Tensor) -> Pair:
    """Vectors (B, D) as unit vectors, with spot ids (B,), of all processes, with this one's gradients."""
    image, gene = (F.normalize(vector.float(), dim=1) for vector in (image, gene))
    return Pair(*(distributed.gather(tensor) for tensor in (image, gene, spots)))


def with_vector(tokens: Tensor, vector: Tensor) -> Tensor:
    """Tokens (B, N, D) of one side, and one more: its vector (B, D) scaled to a token's length -> (B, N + 1, D).

    The fusion then has what the contrast compares and need not learn it from the tokens.
    """
    unit = F.normalize(vector.float(), dim=1) * vector.shape[1] ** 0.5
    return torch.cat([tokens, unit[:, None].to(tokens.dtype)], dim=1)


class StageOne(HostNumbers):
    """Paired encoders with momentum distillation and matching.

    `forward` gives the losses of a batch; after the optimiser's step `after_step` updates the momentum encoders and the
    queue.
    """

    ON_HOST = ("n_steps",)

    def __init__(self, sizes: StageOneSizes, image_weights: Weights = None):
        super().__init__()
        s = self.sizes = sizes
        if s.queue_size and not s.momentum_encoders:
            raise ValueError(f"queue_size {s.queue_size}: a queue holds features of momentum encoders, found none")
        self.image_encoder = ImageEncoder(
            s.image_encoder, s.image_size, s.width, image_weights, s.image_pretrained, s.crop_scales
        )
        self.gene_encoder = GeneEncoder(s.n_genes, s.gene_depth, s.gene_width, s.gene_heads, s.gene_tokens, s.width)
        if s.n_components:  # then it is solved for them before training, and training would only harm it
            self.gene_encoder.linear_path.requires_grad_(False)
        self.contrast = ContrastiveHead()
        self.fusion = Fusion(s.width, s.fusion_blocks)
        self.to_expression = nn.Linear(s.width, s.n_components) if s.n_components else None
        self.queue = FeatureQueue(s.queue_size, s.width)
        self.n_rows: int | None = None  # that compiled encoders take
        self.n_steps: Tensor
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))
        self.image_encoder_m: nn.Module | None = None
        self.gene_encoder_m: nn.Module | None = None
        self.reset_momentum_encoders()

    def reset_momentum_encoders(self) -> None:
        """Copy the encoders as they are, if a loss uses the copies. To be called whenever something else than a step
        changes the encoders: loading weights, freezing layers, an initialisation."""
        if self.sizes.momentum_encoders:
            self.image_encoder_m = momentum_encoder(self.image_encoder)
            self.gene_encoder_m = momentum_encoder(self.gene_encoder)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each momentum encoder with its encoder."""
        pairs = [(self.image_encoder_m, self.image_encoder), (self.gene_encoder_m, self.gene_encoder)]
        return [(encoder_m, encoder) for encoder_m, encoder in pairs if encoder_m is not None]

    def compile_encoders(self, batch_size: int, **options: Any) -> None:
        """torch.compile, with its options, for all encoders; names of parameters stay as they are. `encode_images` and
        `encode_genes` then fill smaller batches up to `batch_size`, for which alone they are compiled."""
        self.n_rows = batch_size
        images, genes = self.image_encoder, self.gene_encoder
        frozen = (*genes.blocks[: genes.n_frozen], *(images.trunk.blocks[: images.n_frozen] if images.n_frozen else ()))
        for block in frozen:  # run once for an encoder and its momentum encoder
            block.compile(**options)
        for encoder in (self.image_encoder, self.gene_encoder, *(encoder_m for encoder_m, _ in self.momentum_pairs())):
            encoder.compile(**options)

    def train(self, mode: bool = True) -> StageOne:
        super().train(mode)
        for encoder_m, _ in self.momentum_pairs():
            encoder_m.eval()
        return self

    def encode_images(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles (B, 3, Z, Z) in 0..1 -> unit vectors (B, D), tokens for the fusion (B, P + 1, D), P <= image_tokens."""
        vector, raw = (rows[: len(tiles)] for rows in self.image_encoder(self._filled(tiles)))
        tokens = self.image_encoder.project_tokens(raw, self.sizes.image_tokens)
        return F.normalize(vector.float(), dim=1), with_vector(tokens, vector)

    def encode_genes(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Bins (B, G) -> unit vectors (B, D), tokens for the fusion (B, K + 1, D)."""
        vector, tokens = (rows[: len(bins)] for rows in self.gene_encoder(self._filled(bins)))
        return F.normalize(vector.float(), dim=1), with_vector(tokens, vector)

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows (B, ...) with the first one repeated, as many as a compiled encoder takes."""
        missing = (self.n_rows or 0) - len(rows)
        return rows if missing <= 0 else torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])])

    def frozen_parts(self, tiles: Tensor, bins: Tensor) -> FrozenParts:
        """What an encoder and its momentum encoder have in common, of images and of genes; None without the latter."""
        if not self.sizes.momentum_encoders:
            return None, None
        return self.image_encoder.frozen_part(tiles), self.gene_encoder.frozen_part(bins)

    @torch.no_grad()
    def encode_m(self, tiles: Tensor, bins: Tensor, spots: Tensor, frozen: FrozenParts) -> Pair | None:
        """Features of the momentum encoders; `frozen` are the `frozen_parts` of tiles and bins."""
        if self.image_encoder_m is None or self.gene_encoder_m is None:
            return None
        return gather_pair(self.image_encoder_m(tiles, frozen[0])[0], self.gene_encoder_m(bins, frozen[1])[0], spots)

    def match(
        self, gene_tokens: Tensor, image_tokens: Tensor, spots: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Loss of true pairs against wrong profiles and wrong images of the whole batch, and the area under its ROC
        curve.

        Parameters
        ----------
        gene_tokens, image_tokens : of this process' spots, each side's vector among them, (B, K, D), (B, P, D)
        spots : ids of all processes' spots
        generator : draws the negatives, in the same state on all processes
        """
        n = len(gene_tokens)
        local = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
        wrong_gene, wrong_image = (draw_negatives(spots, N_NEGATIVES, generator)[local] for _ in range(2))
        genes, images = self.fusion.precompute_genes(gene_tokens), self.fusion.precompute_images(image_tokens)
        all_genes = distributed.gather(genes)
        all_images = [distributed.gather(keys_values, dim=1) for keys_values in images]
        candidates = torch.cat([genes[:, None], all_genes[wrong_gene]], dim=1)  # (B, 1 + N, K, D)
        by_image = self.fusion.score(candidates, images)
        by_gene = [
            self.fusion.score(genes[:, None], [keys_values[:, column] for keys_values in all_images])
            for column in wrong_image.T
        ]
        pairs, others = by_image[:, 0], torch.cat([by_image[:, 1:], *by_gene], dim=1).flatten()
        logits = torch.cat([pairs, others])
        is_pair = torch.cat([torch.ones_like(pairs), torch.zeros_like(others)])
        return losses.matching_loss(logits, is_pair), losses.pair_auc(pairs, others)

    def regress(self, vectors: tuple[Tensor, Tensor], expression: Tensor | None) -> Tensor:
        """Expression loss, the mean of both vectors' (B, D), against components (B, R); 0 without them."""
        total: Tensor = vectors[0].new_zeros(())
        if self.to_expression is None or expression is None:
            return total
        predicted = (self.to_expression(vector) for vector in vectors)
        return sum((losses.expression_loss(values, expression) for values in predicted), total) / 2

    def forward(
        self,
        tiles: Tensor,
        bins: Tensor,
        spots: Tensor,
        alpha: float,
        generator: torch.Generator,
        expression: Tensor | None = None,
        expression_weight: float = 0.0,
        matching_weight: float = 1.0,
    ) -> StepOutput:
        """Losses of a batch. Each of several processes has a part of the batch, and its loss; their mean is the whole
        batch's.

        Parameters
        ----------
        tiles, bins, spots : tiles (B, 3, Z, Z) in 0..1, bins (B, G), spot ids (B,)
        alpha : weight of the momentum encoders' soft target
        generator : of the CPU, draws the negatives; in the same state on all processes
        expression : (B, R), NaN where not measured, or None
        expression_weight, matching_weight : of these losses beside the contrast
        """
        frozen = self.frozen_parts(tiles, bins)
        vector, raw_tokens = self.image_encoder(tiles, frozen[0])
        gene_vector, gene_tokens = self.gene_encoder(bins, frozen[1])
        pair = gather_pair(vector, gene_vector, spots)
        pair_m = self.encode_m(tiles, bins, spots, frozen)
        if pair_m is None and alpha > 0:
            raise ValueError(f"alpha {alpha:g}: distillation needs a model with momentum_encoders")
        contrast = self.contrast(pair, pair_m, self.queue.filled(), alpha)
        matching, auc = contrast.new_zeros(()), contrast.new_full((), 0.5)
        if matching_weight:
            image_tokens = self.image_encoder.project_tokens(raw_tokens, self.sizes.image_tokens)
            sides = with_vector(gene_tokens, gene_vector), with_vector(image_tokens, vector)
            matching, auc = self.match(*sides, pair.spot, generator)
        regression = self.regress((vector, gene_vector), expression)
        loss = contrast + matching_weight * matching + expression_weight * regression
        return StepOutput(loss, contrast, matching, regression, auc, pair_m or pair.detached())

    def contrast_chance(self, batch_size: int) -> float:
        """The contrastive loss of a guess, at the queue's present length."""
        within = math.log(batch_size)
        momentum = math.log(batch_size + self.queue.n_filled)
        return (within + momentum) / 2 if self.sizes.momentum_encoders else within

    @torch.no_grad()
    def after_step(self, *pairs_m: Pair) -> None:
        """Clamp the temperature, update the momentum encoders, push the step's batches into the queue."""
        self.contrast.clamp()
        for encoder_m, encoder in self.momentum_pairs():
            update_momentum(encoder_m, encoder, momentum_at(int(self.n_steps)))
        self.n_steps += 1
        for pair_m in pairs_m:
            self.queue.push(pair_m.image, pair_m.gene, pair_m.spot)

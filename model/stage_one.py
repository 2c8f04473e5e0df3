"""Stage one as a whole: two encoders, their slow twins, the contrast, and the fusion module that judges pairs.

Letters: B batch, G input genes, D shared width, Z tile side in pixels, T target genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import losses
from model.contrastive import ContrastiveHead, Pair
from model.fusion import Fusion, hard_negatives
from model.gene_encoder import GeneEncoder
from model.image_encoder import ImageEncoder, Weights
from model.momentum import FeatureQueue, make_twin, update_twin
from utils import distributed

TWIN_MOMENTUM = 0.995


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
    momentum_encoders: bool = True  # needed by a queue, and by distillation (alpha > 0)
    n_components: int = 0  # of expression, that both vectors are to tell


class StepOutput(NamedTuple):
    """Losses of one batch, and the twin's features that enter the queue after the step."""

    loss: Tensor
    contrast: Tensor
    matching: Tensor
    expression: Tensor
    matching_accuracy: Tensor
    twin: Pair


def twin_momentum(step: int) -> float:
    """Of the twins after a step, 0 the first: rises from 0.1 to TWIN_MOMENTUM, which it reaches at step 1,790. Held at
    that from the start, the twins of a short training would remember the untrained encoders to its end."""
    return min((1 + step) / (10 + step), TWIN_MOMENTUM)


def gather_pair(image: Tensor, gene: Tensor, spots: Tensor) -> Pair:
    """Features (B, D) each and spot ids (B,) of all processes, with this one's gradients."""
    return Pair(*(distributed.gather(each) for each in (image, gene, spots)))


class StageOne(nn.Module):
    """Paired encoders with momentum distillation and matching.

    `forward` gives the losses of a batch; after the optimiser's step `after_step` moves the twins and fills the queue.
    """

    def __init__(self, sizes: StageOneSizes, image_weights: Weights = None):
        super().__init__()
        s = self.sizes = sizes
        if s.queue_size and not s.momentum_encoders:
            raise ValueError(f"queue_size {s.queue_size}: a queue holds features of momentum encoders, found none")
        self.image_encoder = ImageEncoder(
            s.image_encoder, s.image_size, s.width, image_weights, s.image_pretrained, s.crop_scales
        )
        self.gene_encoder = GeneEncoder(s.n_genes, s.gene_depth, s.gene_width, s.gene_heads, s.gene_tokens, s.width)
        if s.n_components:  # then it is solved for them beforehand, and learning would only spoil it
            self.gene_encoder.linear_path.requires_grad_(False)
        self.contrast = ContrastiveHead()
        self.fusion = Fusion(s.width, s.fusion_blocks)
        self.to_expression = nn.Linear(s.width, s.n_components) if s.n_components else None
        self.queue = FeatureQueue(s.queue_size, s.width)
        self.n_steps: Tensor
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.long))
        self.image_twin: nn.Module | None = None
        self.gene_twin: nn.Module | None = None
        self.make_twins()

    def make_twins(self) -> None:
        """Copy the encoders as they are, where a loss needs the copies; repeat it when weights or frozen layers change."""
        if self.sizes.momentum_encoders:
            self.image_twin, self.gene_twin = make_twin(self.image_encoder), make_twin(self.gene_encoder)

    def compile_encoders(self) -> None:
        """torch.compile for both encoders and their twins; names of parameters stay as they are."""
        for encoder in (self.image_encoder, self.gene_encoder, self.image_twin, self.gene_twin):
            if encoder is not None:
                encoder.compile()

    def train(self, mode: bool = True) -> StageOne:
        super().train(mode)
        for encoder in (self.image_twin, self.gene_twin):
            if encoder is not None:
                encoder.eval()
        return self

    def encode_images(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles (B, 3, Z, Z) in 0..1 -> unit vectors (B, D), tokens for the fusion (B, <= image_tokens, D)."""
        vector, raw = self.image_encoder(tiles)
        return F.normalize(vector.float(), dim=1), self.image_encoder.project_tokens(raw, self.sizes.image_tokens)

    def encode_genes(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Bins (B, G) -> unit vectors (B, D), gene tokens (B, K, D)."""
        vector, tokens = self.gene_encoder.encode(bins)
        return F.normalize(vector.float(), dim=1), tokens

    @torch.no_grad()
    def encode_with_twins(self, tiles: Tensor, bins: Tensor, start: Tensor, spots: Tensor) -> Pair | None:
        if self.image_twin is None or self.gene_twin is None:
            return None
        image, gene = self.image_twin(tiles)[0], self.gene_twin(bins, start)[0]
        return gather_pair(F.normalize(image.float(), dim=1), F.normalize(gene.float(), dim=1), spots)

    def match(
        self, gene_tokens: Tensor, image_tokens: Tensor, student: Pair, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy (in its mean over pairs and non-pairs) of true pairs against hard ones from the batch.

        `student` is of all processes' spots, the tokens are of this one's, which are judged here.
        """
        n = len(gene_tokens)
        mine = slice(distributed.rank() * n, (distributed.rank() + 1) * n)
        similarity = self.contrast.similarity(student.image.detach(), student.gene.detach())
        wrong_gene = hard_negatives(similarity, student.spot, generator)[mine]
        wrong_image = hard_negatives(similarity.T, student.spot, generator)[mine]
        genes, images = self.fusion.read_genes(gene_tokens), self.fusion.read_images(image_tokens)
        all_images = [distributed.gather(keys_values, dim=1) for keys_values in images]
        own = self.fusion.judge(torch.stack([genes, distributed.gather(genes)[wrong_gene]], dim=1), images)
        other = self.fusion.judge(genes[:, None], [keys_values[:, wrong_image] for keys_values in all_images])
        logits = torch.cat([own.T.flatten(), other.flatten()])
        is_pair = torch.arange(len(logits), device=logits.device) < len(gene_tokens)
        right = ((logits > 0) == is_pair).float()
        accuracy = (right[is_pair].mean() + right[~is_pair].mean()) / 2
        return losses.matching_loss(logits, is_pair), accuracy

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
        hidden: Tensor | None = None,
    ) -> StepOutput:
        """Tiles (B, 3, Z, Z) in 0..1, bins (B, G), spot ids (B,), targets (B, T) or None -> losses. `hidden`, if given,
        is what `frozen_part` made of the bins earlier. Of several processes each has a part of the batch, and its loss;
        their mean is the whole batch's."""
        vector, raw_tokens = self.image_encoder(tiles)
        start = self.gene_encoder.frozen_part(bins) if hidden is None else hidden
        gene_vector, gene_tokens = self.gene_encoder(bins, start)
        student = gather_pair(F.normalize(vector.float(), dim=1), F.normalize(gene_vector.float(), dim=1), spots)
        twin = self.encode_with_twins(tiles, bins, start, spots)
        if twin is None:
            if alpha > 0:
                raise ValueError(f"alpha {alpha:g}: distillation needs a model with momentum_encoders")
            twin = student.detached()
        contrast = self.contrast(student, twin, self.queue.filled(), alpha)
        image_tokens = self.image_encoder.project_tokens(raw_tokens, self.sizes.image_tokens)
        matching, accuracy = self.match(gene_tokens, image_tokens, student, generator)
        regression = vector.new_zeros(())
        if self.to_expression is not None and expression is not None:
            read_off = (self.to_expression(each) for each in (vector, gene_vector))
            regression = sum((losses.expression_loss(each, expression) for each in read_off), regression) / 2
        loss = contrast + matching_weight * matching + expression_weight * regression
        return StepOutput(loss, contrast, matching, regression, accuracy, twin)

    @torch.no_grad()
    def after_step(self, *twins: Pair) -> None:
        """Temperature kept in bounds, twins moved, the step's batches put into the queue."""
        self.contrast.clamp()
        momentum = twin_momentum(int(self.n_steps))
        for twin_encoder, encoder in ((self.image_twin, self.image_encoder), (self.gene_twin, self.gene_encoder)):
            if twin_encoder is not None:
                update_twin(twin_encoder, encoder, momentum)
        self.n_steps += 1
        for twin in twins:
            self.queue.push(twin.image, twin.gene, twin.spot)

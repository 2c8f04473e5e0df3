"""Stage two: the frozen image encoder, and the decoder on its features.

Letters: B batch, S spots, D shared width, V rows of D that hold a tile's pooled features, T tokens of a tile,
N context spots, G target genes, Z tile side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import GeneDecoder
from model.image_encoder import ImageEncoder

GRID_SIDE = 4  # tokens of a tile are pooled to 4 x 4


@dataclass(frozen=True)
class StageTwoSizes:
    """What must be known to build the model before its weights are loaded; kept in the checkpoint."""

    n_genes: int
    image_encoder: str
    image_size: int
    crop_scales: Sequence[float] = (1.0,)
    width: int = 512
    decoder_layers: int = 6
    decoder_width: int = 64
    context: int = 18
    dropout: float = 0.1
    bandwidths: Sequence[float] = (1.0, 2.0, 4.0)  # in pitches, of the smoothed neighbour features
    landmarks: int = 2000  # spots of the decoder's kernel ridge
    tta: int = 1  # quarter turns of a tile that its features are averaged over: 1, 2, 4, or 8 with the flips


class StageTwo(nn.Module):
    """Frozen image encoder, run once per tile by `encode`, and gene decoder, which trains."""

    def __init__(self, sizes: StageTwoSizes):
        super().__init__()
        s = self.sizes = sizes
        self.image_encoder = ImageEncoder(
            s.image_encoder, s.image_size, s.width, pretrained=True, crop_scales=s.crop_scales
        )
        self.image_encoder.requires_grad_(False).eval()
        self.n_vectors = -(-self.image_encoder.to_vector.in_features // s.width)
        self.decoder = GeneDecoder(
            s.width,
            s.n_genes,
            s.decoder_layers,
            s.decoder_width,
            s.dropout,
            self.n_vectors,
            s.landmarks,
            len(s.bandwidths),
        )
        self.target_mean: Tensor
        self.target_sd: Tensor
        self.register_buffer("target_mean", torch.zeros(s.n_genes))
        self.register_buffer("target_sd", torch.ones(s.n_genes))

    def train(self, mode: bool = True) -> StageTwo:
        super().train(mode)
        self.image_encoder.eval()
        return self

    def set_target_scale(self, mean: Tensor, sd: Tensor) -> None:
        """Mean and deviation of each gene (G,) over train spots: the decoder predicts standardised genes."""
        self.target_mean.copy_(mean)
        self.target_sd.copy_(sd)

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The arguments of GeneDecoder.forward -> expression (B, G) in the units of the target."""
        return self.decoder(**batch).float() * self.target_sd + self.target_mean

    @torch.no_grad()
    def encode(self, tiles: Tensor) -> Tensor:
        """Tiles (B, 3, Z, Z) in 0..1 -> features (B, V + T, D), averaged over `tta` symmetries of the tile.

        The first V rows are the trunk's pooled features, padded with zeros, the others the pooled tokens. Features
        before a contrast's projection serve other tasks better than those after it (Chen et al. 2020,
        arXiv 2002.05709, section 4.2).
        """
        symmetries = range(0, 8, 8 // self.sizes.tta)
        return torch.stack([self.encode_transformed(tiles, symmetry) for symmetry in symmetries]).mean(0)

    def split(self, features: Tensor) -> dict[str, Tensor]:
        """Features (B, V + T, D) as the decoder takes them: vector (B, V D), tokens (B, T, D)."""
        return {"vector": features[:, : self.n_vectors].flatten(1), "tokens": features[:, self.n_vectors :]}

    def encode_transformed(self, tiles: Tensor, symmetry: int) -> Tensor:
        """Features of the tile flipped (where `symmetry` is odd), then rotated by symmetry // 2 quarters; tokens are
        put back where they are in the tile."""
        quarters, flipped = divmod(symmetry, 2)
        pooled, raw = self.image_encoder.features(torch.rot90(tiles.flip(3) if flipped else tiles, quarters, (2, 3)))
        width = self.sizes.width
        vectors = F.pad(pooled, (0, self.n_vectors * width - pooled.shape[1])).unflatten(1, (-1, width))
        tokens = self.image_encoder.grid_tokens(raw, GRID_SIDE)
        side = math.isqrt(tokens.shape[1])
        grid = torch.rot90(tokens.unflatten(1, (side, side)), -quarters, (1, 2))
        grid = grid.flip(2) if flipped else grid
        return torch.cat([vectors, grid.flatten(1, 2)], dim=1)

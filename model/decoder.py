"""Linear expansion and Transformer decoder: from a image and its surroundings to the expression of the panel's genes.

Letters: B batch, G genes, D width of a image's tokens, V D that of its vector, N context spots, T tokens of the
tile, W decoder width, R reaches, M landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import CrossBlock

OWN_SHARE = 2.0  # of a spot's own vector, where the means around it have 1 each


class KernelRidge(nn.Module):
    """Ridge regression with a Gaussian kernel on landmark spots, solved beforehand.
    (utils/training/decoder_initialisation.py)

    What is seen of a spot has P parts: its vector, which weighs OWN_SHARE times, and the means around it at each reach,
    which weigh once. The squared distance of two spots is the weighted mean over the parts of theirs there, in units of
    that of two landmarks. The less `sharpness`, the closer to a linear map.
    """

    def __init__(self, n_landmarks: int, n_parts: int, width: int, n_genes: int):
        super().__init__()
        self.landmarks: Tensor
        self.scale: Tensor
        self.sharpness: Tensor
        self.register_buffer("landmarks", torch.zeros(n_landmarks, n_parts * width))  # scaled
        self.register_buffer("scale", torch.ones(n_parts))  # by which a part enters the distance
        self.register_buffer("sharpness", torch.ones(()))
        self.read = nn.Linear(n_landmarks, n_genes).requires_grad_(False)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    @torch.no_grad()
    def look_from(self, landmarks: Tensor, n_parts: int) -> None:
        """Spots (M, P, D) to measure distances to, by the first parts of what is seen; one that never varies is left
        out. Two spots lie twice their variance apart."""
        share = (torch.arange(len(self.scale), device=landmarks.device) < n_parts).float()
        share[0] = OWN_SHARE
        variance = landmarks.var(0, correction=0).sum(-1)
        self.scale.copy_((share / share.sum() / (2 * variance)).sqrt().where(variance > 1e-6, 0))
        self.landmarks.copy_(self.scaled(landmarks))

    def scaled(self, seen: Tensor) -> Tensor:
        """(B, P, D) -> (B, P D), between which distances are Euclidean."""
        return (seen.float() * self.scale[:, None]).flatten(1)

    def distances(self, seen: Tensor) -> Tensor:
        """Squared, to each landmark, about 1 on average: (B, P, D) -> (B, M). In single precision: near a linear map
        large numbers cancel."""
        with torch.autocast(seen.device.type, enabled=False):
            own = self.scaled(seen)
            squares = own.square().sum(1, keepdim=True) + self.landmarks.square().sum(1)
            return (squares - 2 * own @ self.landmarks.T).clamp(min=0)

    def forward(self, seen: Tensor) -> Tensor:
        """(B, P, D) -> (B, G)"""
        with torch.autocast(seen.device.type, enabled=False):
            return self.read((-self.sharpness * self.distances(seen)).exp())


class LinearExpansion(nn.Sequential):
    """The image's vector to a start value for each gene, 512 -> 1024 -> 1500 -> G as published: (B, D) -> (B, G)."""

    def __init__(self, width: int, n_genes: int, hidden: tuple[int, int] = (1024, 1500)):
        first, second = hidden
        super().__init__(
            *(nn.Linear(width, first), nn.BatchNorm1d(first), nn.LeakyReLU()),
            *(nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU()),
            nn.Linear(second, n_genes),
        )


class GeneDecoder(nn.Module):
    """Genes are the queries, the image is the memory.

    A gene's start value is a kernel ridge regression on the vector of the spot and the means around it, solved
    beforehand (`start_from`), plus the linear expansion. A query is the gene's learned embedding plus its start value
    along a learned direction. The memory holds the vector of the spot, the tokens of its tile, and the vectors of the
    spots around it with their offsets. The prediction is the start value plus what the decoder reads out: both learnt
    parts begin at zero once the ridge is there, so that training starts from the ridge and not behind it.
    """

    def __init__(
        self,
        width: int,
        n_genes: int,
        layers: int = 6,
        decoder_width: int = 64,
        dropout: float = 0.1,
        n_vectors: int = 1,
        n_landmarks: int = 1,
        n_reaches: int = 0,
    ):
        super().__init__()
        self.ridge = KernelRidge(n_landmarks, 1 + n_reaches, n_vectors * width, n_genes)
        self.expand = LinearExpansion(n_vectors * width, n_genes)
        self.gene = nn.Parameter(torch.randn(n_genes, decoder_width))
        self.start_direction = nn.Parameter(torch.randn(decoder_width))
        self.to_memory = nn.Linear(n_vectors * width, decoder_width)
        self.token_to_memory = nn.Linear(width, decoder_width)
        self.kind = nn.Parameter(torch.randn(3, decoder_width))  # spot's vector, tile's tokens, context
        self.to_offset = nn.Sequential(nn.Linear(2, decoder_width), nn.GELU(), nn.Linear(decoder_width, decoder_width))
        self.norm_memory = nn.LayerNorm(decoder_width)
        self.blocks = nn.ModuleList(CrossBlock(decoder_width, 4, 4 * decoder_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(decoder_width)
        self.read_out = nn.Linear(decoder_width, 1)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    @torch.no_grad()
    def start_from(self, sharpness: float, weight: Tensor, bias: Tensor) -> None:
        """Begin as a kernel ridge (G, M), (G,) on the landmarks of `ridge`."""
        self.ridge.sharpness.fill_(sharpness)
        self.ridge.read.weight.copy_(weight)
        self.ridge.read.bias.copy_(bias)
        for parameter in self.expand[-1].parameters():
            nn.init.zeros_(parameter)

    def memory(self, vector: Tensor, tokens: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        """(B, V D), (B, T, D), (B, N, V D), (B, N, 2) -> (B, 1 + T + N, W)."""
        parts = [
            self.to_memory(vector)[:, None] + self.kind[0],
            self.token_to_memory(tokens) + self.kind[1],
            self.to_memory(context) + self.kind[2] + self.to_offset(offsets),
        ]
        return self.norm_memory(torch.cat(parts, dim=1))

    def forward(
        self, vector: Tensor, tokens: Tensor, context: Tensor, offsets: Tensor, present: Tensor, around: Tensor
    ) -> Tensor:
        """Standardised features (B, V D), (B, T, D), (B, N, V D), offsets (B, N, 2) in pitches, present (B, N) bool,
        means around the spot (B, R, V D) -> expression (B, G) in the units of the target the weights were trained on.
        """
        start = self.ridge(torch.cat([vector[:, None], around], dim=1)) + self.expand(vector)
        own = present.new_ones(len(present), 1 + tokens.shape[1])
        seen = torch.cat([own, present], dim=1)
        memory = self.memory(vector, tokens, context, offsets)
        queries = self.gene + start.unsqueeze(-1) * self.start_direction
        for block in self.blocks:
            queries = block(queries, memory, seen)
        return start + self.read_out(self.norm(queries)).squeeze(-1)

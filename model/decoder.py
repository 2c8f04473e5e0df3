"""Linear expansion, kernel ridge and Transformer decoder: from a tile and its neighbourhood to gene expression.

Letters: B batch, G genes, D width of a tile's tokens, V D width of its vector, N context spots, T tokens of the tile,
W decoder width, R bandwidths, P = 1 + R parts of a spot (its vector, and the smoothed neighbour vectors at each
bandwidth), M landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import CrossBlock

VECTOR_WEIGHT = 2.0  # of a spot's own vector in the distance; the smoothed neighbour vectors weigh 1 each


class KernelRidge(nn.Module):
    """Ridge regression with a Gaussian kernel on landmark spots, solved before training
    (utils/training/decoder_initialisation.py).

    k(a, b) = exp(-gamma d(a, b)), where d is the weighted mean over parts of the squared distance, in units of the mean
    squared distance of two landmarks. A small gamma is close to a linear map.
    """

    def __init__(self, n_landmarks: int, n_parts: int, width: int, n_genes: int):
        super().__init__()
        self.landmarks: Tensor
        self.scale: Tensor
        self.gamma: Tensor
        self.register_buffer("landmarks", torch.zeros(n_landmarks, n_parts * width))  # scaled
        self.register_buffer("scale", torch.ones(n_parts))  # factor of each part in the distance
        self.register_buffer("gamma", torch.ones(()))
        self.linear = nn.Linear(n_landmarks, n_genes).requires_grad_(False)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def set_landmarks(self, landmarks: Tensor, n_parts: int) -> None:
        """Landmark spots (M, P, V D), of which the first `n_parts` parts count; a constant part is left out."""
        weight = (torch.arange(len(self.scale), device=landmarks.device) < n_parts).float()
        weight[0] = VECTOR_WEIGHT
        variance = landmarks.var(0, correction=0).sum(-1)  # half the mean squared distance of two landmarks
        self.scale.copy_((weight / weight.sum() / (2 * variance)).sqrt().where(variance > 1e-6, 0))
        self.landmarks.copy_(self.scaled(landmarks))

    def scaled(self, spots: Tensor) -> Tensor:
        """(B, P, V D) -> (B, P V D), between which distances are Euclidean."""
        return (spots.float() * self.scale[:, None]).flatten(1)

    def distances(self, spots: Tensor) -> Tensor:
        """Squared distance to each landmark, about 1 on average: (B, P, V D) -> (B, M). In fp32: for a small gamma
        large numbers cancel."""
        with torch.autocast(spots.device.type, enabled=False):
            scaled = self.scaled(spots)
            squares = scaled.square().sum(1, keepdim=True) + self.landmarks.square().sum(1)
            return (squares - 2 * scaled @ self.landmarks.T).clamp(min=0)

    def forward(self, spots: Tensor) -> Tensor:
        """(B, P, V D) -> (B, G)"""
        with torch.autocast(spots.device.type, enabled=False):
            return self.linear((-self.gamma * self.distances(spots)).exp())


class LinearExpansion(nn.Sequential):
    """The image vector to an initial value for each gene, 512 -> 1024 -> 1500 -> G as published: (B, V D) -> (B, G)."""

    def __init__(self, width: int, n_genes: int, hidden: tuple[int, int] = (1024, 1500)):
        first, second = hidden
        super().__init__(
            *(nn.Linear(width, first), nn.BatchNorm1d(first), nn.LeakyReLU()),
            *(nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU()),
            nn.Linear(second, n_genes),
        )


class GeneDecoder(nn.Module):
    """Genes are the queries, the image is the memory.

    A gene's initial value is a kernel ridge regression on the vector of the spot and the smoothed neighbour vectors,
    solved before training (`initialise`), plus the linear expansion. Its query is a learned embedding plus the initial
    value times a learned direction. The memory holds the vector of the spot, the tokens of its tile, and the vectors of
    the context spots with their offsets. The prediction is the initial value plus the decoder's output; with the ridge
    set, expansion and output begin at zero, so that training starts at the ridge.
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
        n_bandwidths: int = 0,
    ):
        super().__init__()
        self.ridge = KernelRidge(n_landmarks, 1 + n_bandwidths, n_vectors * width, n_genes)
        self.expand = LinearExpansion(n_vectors * width, n_genes)
        self.gene_embedding = nn.Parameter(torch.randn(n_genes, decoder_width))
        self.initial_direction = nn.Parameter(torch.randn(decoder_width))
        self.to_memory = nn.Linear(n_vectors * width, decoder_width)
        self.token_to_memory = nn.Linear(width, decoder_width)
        self.type_embedding = nn.Parameter(torch.randn(3, decoder_width))  # spot's vector, tile's tokens, context
        self.to_offset = nn.Sequential(nn.Linear(2, decoder_width), nn.GELU(), nn.Linear(decoder_width, decoder_width))
        self.norm_memory = nn.LayerNorm(decoder_width)
        self.blocks = nn.ModuleList(CrossBlock(decoder_width, 4, 4 * decoder_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(decoder_width)
        self.read_out = nn.Linear(decoder_width, 1)
        nn.init.zeros_(self.read_out.weight)
        nn.init.zeros_(self.read_out.bias)

    @torch.no_grad()
    def initialise(self, gamma: float, weight: Tensor, bias: Tensor) -> None:
        """Start at a kernel ridge (G, M), (G,) on the landmarks of `ridge`."""
        self.ridge.gamma.fill_(gamma)
        self.ridge.linear.weight.copy_(weight)
        self.ridge.linear.bias.copy_(bias)
        for parameter in self.expand[-1].parameters():
            nn.init.zeros_(parameter)

    def memory(self, vector: Tensor, tokens: Tensor, context: Tensor, offsets: Tensor) -> Tensor:
        """(B, V D), (B, T, D), (B, N, V D), (B, N, 2) -> (B, 1 + T + N, W)."""
        parts = [
            self.to_memory(vector)[:, None] + self.type_embedding[0],
            self.token_to_memory(tokens) + self.type_embedding[1],
            self.to_memory(context) + self.type_embedding[2] + self.to_offset(offsets),
        ]
        return self.norm_memory(torch.cat(parts, dim=1))

    def forward(
        self, vector: Tensor, tokens: Tensor, context: Tensor, offsets: Tensor, present: Tensor, smoothed: Tensor
    ) -> Tensor:
        """Standardised features to expression (B, G) in the units of the target that the weights were trained on.

        Parameters
        ----------
        vector, tokens : of the spot's tile (B, V D), (B, T, D)
        context, offsets : vectors of the nearest spots (B, N, V D), and where they are (B, N, 2), in pitches
        present : (B, N) bool, False where a spot has fewer neighbours
        smoothed : neighbour vectors averaged at each bandwidth (B, R, V D)
        """
        initial = self.ridge(torch.cat([vector[:, None], smoothed], dim=1)) + self.expand(vector)
        own = present.new_ones(len(present), 1 + tokens.shape[1])
        attended = torch.cat([own, present], dim=1)
        memory = self.memory(vector, tokens, context, offsets)
        queries = self.gene_embedding + initial.unsqueeze(-1) * self.initial_direction
        for block in self.blocks:
            queries = block(queries, memory, attended)
        return initial + self.read_out(self.norm(queries)).squeeze(-1)

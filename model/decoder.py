"""Linear expansion and Transformer decoder: from a picture and its surroundings to the expression of the panel's genes.

Letters: B batch, G genes, D width of a picture's tokens, V D that of its vector, N context spots, T tokens of the
tile, W decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import CrossBlock

RINGS = ((0.0, 1.2), (1.2, 2.3))  # distances in pitches: on a Visium array the 6 nearest spots and the 12 behind them


def with_rings(vector: Tensor, context: Tensor, offsets: Tensor, present: Tensor) -> Tensor:
    """A spot's vector beside the means over its two rings of neighbours, zero where a ring is empty: (B, D), (B, N, D),
    (B, N, 2) in pitches, (B, N) bool -> (B, 3 D)."""
    distance = offsets.norm(dim=-1)
    parts = [vector]
    for inner, outer in RINGS:
        inside = (present & ((distance > inner) | (inner == 0)) & (distance <= outer)).to(context.dtype)
        parts.append(torch.einsum("bn,bnd->bd", inside, context) / inside.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(parts, dim=1)


class LinearExpansion(nn.Sequential):
    """The picture's vector to a start value for each gene, 512 -> 1024 -> 1500 -> G as published: (B, D) -> (B, G)."""

    def __init__(self, width: int, n_genes: int, hidden: tuple[int, int] = (1024, 1500)):
        first, second = hidden
        super().__init__(
            *(nn.Linear(width, first), nn.BatchNorm1d(first), nn.LeakyReLU()),
            *(nn.Linear(first, second), nn.BatchNorm1d(second), nn.LeakyReLU()),
            nn.Linear(second, n_genes),
        )


class GeneDecoder(nn.Module):
    """Genes are the queries, the picture is the memory.

    A gene's start value is a ridge regression on the vectors of the spot and of its two rings, solved beforehand
    (`start_from`), plus the linear expansion. A query is the gene's learned embedding plus its start value along a
    learned direction. The memory holds the vector of the spot, the tokens of its tile, and the vectors of the spots
    around it with their offsets. The prediction is the start value plus what the decoder reads out: both learnt parts
    begin at zero once the ridge is there, so that training starts from the ridge and not behind it.
    """

    def __init__(
        self,
        width: int,
        n_genes: int,
        layers: int = 6,
        decoder_width: int = 64,
        dropout: float = 0.1,
        n_vectors: int = 1,
    ):
        super().__init__()
        self.ridge = nn.Linear(3 * n_vectors * width, n_genes).requires_grad_(False)
        nn.init.zeros_(self.ridge.weight)
        nn.init.zeros_(self.ridge.bias)
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
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as a linear map (G, 3 D), (G,) of the spot's vector and its rings' means."""
        self.ridge.weight.copy_(weight)
        self.ridge.bias.copy_(bias)
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

    def forward(self, vector: Tensor, tokens: Tensor, context: Tensor, offsets: Tensor, present: Tensor) -> Tensor:
        """Standardised features (B, V D), (B, T, D), (B, N, V D), offsets (B, N, 2) in pitches, present (B, N) bool ->
        expression (B, G) in the units of the target the weights were trained on."""
        start = self.ridge(with_rings(vector, context, offsets, present)) + self.expand(vector)
        own = present.new_ones(len(present), 1 + tokens.shape[1])
        seen = torch.cat([own, present], dim=1)
        memory = self.memory(vector, tokens, context, offsets)
        queries = self.gene + start.unsqueeze(-1) * self.start_direction
        for block in self.blocks:
            queries = block(queries, memory, seen)
        return start + self.read_out(self.norm(queries)).squeeze(-1)

"""G(.): scBERT's Performer over a panel of named genes, gathered into a few tokens and one vector.

Yang et al. 2022 (scBERT), doi 10.1038/s42256-022-00534-z. Letters: B batch, G genes, W width of the Performer,
K gene tokens, D shared width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.layers import Attention, Standardise
from model.performer import PerformerBlock

N_BINS = 7  # floor(log2(1 + counts per 10,000)) cut at 5 (0..5), and scBERT's mask token (6)


class GatherTokens(nn.Module):
    """K + 1 learned queries attend to all genes: (B, G, W) -> tokens (B, K, D) and the vector (B, D)."""

    def __init__(self, gene_width: int, width: int, n_tokens: int, heads: int = 8):
        super().__init__()
        self.to_width = nn.Linear(gene_width, width)
        self.norm_memory = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(n_tokens + 1, width))
        self.attend = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.to_vector = nn.Linear(width, width)

    def forward(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.norm_memory(self.to_width(genes))
        gathered = self.norm(self.attend(self.queries.expand(len(genes), -1, -1), memory))
        return gathered[:, 1:], self.to_vector(gathered[:, 0])


class GeneEncoder(nn.Module):
    """Bins of expression (B, G) in 0..6 -> vector (B, D) before normalisation, gene tokens (B, K, D).

    A linear path beside the Performer leads from the bins to the vector: a few hundred spots do not suffice to train a
    Performer without pretrained weights to what a linear map learns from them in seconds.
    """

    def __init__(
        self, n_genes: int, depth: int = 6, gene_width: int = 200, heads: int = 10, n_tokens: int = 64, width: int = 512
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(N_BINS, gene_width)
        self.gene_embedding = nn.Embedding(n_genes, gene_width)
        self.blocks = nn.ModuleList(PerformerBlock(gene_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(gene_width)
        self.gather = GatherTokens(gene_width, width, n_tokens)
        self.linear_path: Any = nn.Sequential(Standardise(n_genes, min_sd=0.1), nn.Linear(n_genes, width))
        self.n_frozen = 0  # blocks before the first that trains, set by `freeze_trunk`

    def measure(self, bins: Tensor) -> None:
        """Fix the mean and deviation that the linear path standardises by: bins (n, G) float of train spots."""
        standardise, _ = self.linear_path
        standardise.measure(bins.mean(0), bins.std(0, correction=0))

    def standardised(self, bins: Tensor) -> Tensor:
        """Bins (n, G) as the linear path's layer reads them."""
        return self.linear_path[0](bins.float())

    @torch.no_grad()
    def warm_start(self, weight: Tensor, bias: Tensor, rest: float) -> None:
        """Let the vector begin as a linear map of the standardised bins.

        Parameters
        ----------
        weight, bias : (R, G), (R,), of the first R dimensions; the linear path gives 0 in the others
        rest : factor of what the Performer adds to the vector
        """
        _, layer = self.linear_path
        for parameter, rows in ((layer.weight, weight), (layer.bias, bias)):
            parameter.zero_()
            parameter[: len(rows)] = rows
        self.gather.to_vector.weight.mul_(rest)
        self.gather.to_vector.bias.zero_()

    def embed(self, bins: Tensor) -> Tensor:
        return self.token_embedding(bins.long()) + self.gene_embedding.weight

    @torch.no_grad()
    def frozen_part(self, bins: Tensor) -> Tensor | None:
        """Output (B, G, W) of the frozen blocks, shared with the momentum encoder; None if no block is frozen."""
        if self.n_frozen == 0:
            return None
        hidden = self.embed(bins)
        for block in self.blocks[: self.n_frozen]:
            hidden = block(hidden)
        return hidden

    def forward(self, bins: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bins (B, G) -> vector (B, D), tokens (B, K, D). `frozen` saves a second run of `frozen_part`."""
        frozen = self.frozen_part(bins) if frozen is None else frozen
        hidden = self.embed(bins) if frozen is None else frozen
        for block in self.blocks[self.n_frozen :]:
            hidden = block(hidden)
        tokens, vector = self.gather(self.norm(hidden))
        return vector + self.linear_path(bins.float()), tokens

    def freeze_trunk(self, tuned_block: int) -> None:
        """Freeze all but block `tuned_block` (counted from 0), the final norm and the gathering head."""
        if not 0 <= tuned_block < len(self.blocks):
            raise ValueError(
                f"--tune_block: expected 0 to {len(self.blocks) - 1}, --gene_depth less one, found {tuned_block}; "
                "correct it"
            )
        for part in (self.token_embedding, self.gene_embedding, *self.blocks):
            part.requires_grad_(False)
        self.blocks[tuned_block].requires_grad_(True)
        self.n_frozen = tuned_block

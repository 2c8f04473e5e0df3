"""Masked-bin prediction, what scBERT's gene encoder is pretrained by: the bins of some genes are told from the others'.

Yang et al. 2022 (scBERT), doi 10.1038/s42256-022-00534-z. Letters: B batch, G genes, W width of the Performer, V bins
that a gene can have (the token beyond them is the mask).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gene_encoder import N_BINS, GeneEncoder

MASK = N_BINS - 1  # the last token
SHOWN_MASKED = 0.9  # of the places to predict show the mask, the others their own bin (scBERT)


def masked_places(measured: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """Draw the places to predict, a share of those measured and at least one of a spot: (B, G) bool -> (B, G) bool.

    The bins themselves have no say. scBERT draws among expressed genes only; a mask then tells that its gene is not
    zero, and zeros, most of what a slice of spots holds, are never asked for. Drawn alike over all bins a mask tells
    nothing, and the least that a constant per gene can reach is the entropy of the gene's own distribution.
    """
    drawn = torch.rand(measured.shape, generator=draws, device=measured.device).masked_fill(~measured, 1)
    return (drawn < share) | (drawn == drawn.amin(1, keepdim=True))


def hide(bins: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, G): the mask at `places` (B, G) bool, the bins elsewhere."""
    return bins.masked_fill(places, MASK)


def masked_loss(logits: Tensor, bins: Tensor, places: Tensor) -> Tensor:
    """Mean cross entropy, in nats, over the places to predict: (B, G, V), (B, G), (B, G) bool -> scalar."""
    return F.cross_entropy(logits[places].float(), bins[places].long())


class MaskedBins(nn.Module):
    """The encoder's trunk under a head that reads each gene's bin off its token; only pretraining has the head.

    The head adds an offset per gene and bin. `begin` sets it to the log of the gene's distribution, and the weights
    begin at zero: before the first step the model predicts that distribution, and what it learns is what lies beyond.
    """

    def __init__(self, encoder: GeneEncoder):
        super().__init__()
        n_genes, width = encoder.gene_embedding.weight.shape
        self.encoder = encoder
        self.to_bins = nn.Linear(width, MASK, bias=False)
        self.of_gene = nn.Parameter(torch.zeros(n_genes, MASK))
        nn.init.zeros_(self.to_bins.weight)

    @torch.no_grad()
    def begin(self, log_marginal: Tensor) -> None:
        """`log_marginal` (G, V): log of each gene's distribution over bins."""
        self.of_gene.copy_(log_marginal)

    def taught(self) -> list[nn.Parameter]:
        """What pretraining teaches: embeddings, blocks and final norm of the encoder, and the head."""
        one = self.encoder
        parts = (one.token_embedding, one.gene_embedding, one.blocks, one.norm, self.to_bins)
        return [*(p for part in parts for p in part.parameters()), self.of_gene]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, G) -> logits (B, G, V)."""
        hidden = self.encoder.embed(tokens)
        for block in self.encoder.blocks:
            hidden = block(hidden)
        return self.to_bins(self.encoder.norm(hidden)) + self.of_gene

    def loss(self, bins: Tensor, measured: Tensor, share: float, draws: torch.Generator) -> Tensor:
        """Masked-bin prediction of a batch: bins (B, G), measured (B, G) bool -> scalar."""
        places = masked_places(measured, share, draws)
        shown = torch.rand(bins.shape, generator=draws, device=bins.device) < SHOWN_MASKED
        return masked_loss(self(hide(bins, places & shown)), bins, places)

    def log_probabilities(self, bins: Tensor, places: Tensor) -> Tensor:
        """Log probabilities (B, G, V) float32 where all of `places` are hidden: bins (B, G), places (B, G) bool."""
        return self(hide(bins, places)).float().log_softmax(-1)

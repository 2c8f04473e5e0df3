"""Masked-bin prediction, scBERT's pretraining: the bins of some genes of a spot are predicted from the others.

Yang et al. 2022 (scBERT), doi 10.1038/s42256-022-00534-z. Letters: B batch, G genes, W width of the Performer, V bins
that a gene can have (token V is the mask).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gene_encoder import N_BINS, GeneEncoder

MASK = N_BINS - 1  # the last token
MASKED_FRACTION = 0.9  # of the places to predict; the others keep their bin (scBERT)


def masked_places(measured: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw the places to predict, a fraction of those measured, at least one per spot: (B, G) bool -> (B, G) bool.

    Places are drawn whatever their bin. scBERT draws among expressed genes only; a mask then implies a gene above zero,
    and zeros, most of a spot, are never predicted. Here a mask holds no information, and the lowest loss of a constant
    per gene is the entropy of that gene's distribution.
    """
    drawn = torch.rand(measured.shape, generator=generator, device=measured.device).masked_fill(~measured, 1)
    return (drawn < fraction) | (drawn == drawn.amin(1, keepdim=True))


def hide(bins: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, G): the mask at `places` (B, G) bool, the bins elsewhere."""
    return bins.masked_fill(places, MASK)


def masked_loss(logits: Tensor, bins: Tensor, places: Tensor) -> Tensor:
    """Mean cross entropy, in nats, over the places to predict: (B, G, V), (B, G), (B, G) bool -> scalar."""
    return F.cross_entropy(logits[places].float(), bins[places].long())


class MaskedBins(nn.Module):
    """The encoder's trunk with a head that predicts each gene's bin from its token; the head serves pretraining only.

    The head's bias per gene and bin is set by `initialise` to the log of the gene's distribution, and its weights begin
    at zero: before the first step the model predicts that distribution.
    """

    def __init__(self, encoder: GeneEncoder):
        super().__init__()
        n_genes, width = encoder.gene_embedding.weight.shape
        self.encoder = encoder
        self.to_bins = nn.Linear(width, MASK, bias=False)
        self.gene_bias = nn.Parameter(torch.zeros(n_genes, MASK))
        nn.init.zeros_(self.to_bins.weight)

    @torch.no_grad()
    def initialise(self, log_marginal: Tensor) -> None:
        """`log_marginal` (G, V): log of each gene's distribution over bins."""
        self.gene_bias.copy_(log_marginal)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Of the encoder embeddings, blocks and final norm, and the head."""
        encoder = self.encoder
        modules = (encoder.token_embedding, encoder.gene_embedding, encoder.blocks, encoder.norm, self.to_bins)
        return [*(p for module in modules for p in module.parameters()), self.gene_bias]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, G) -> logits (B, G, V)."""
        hidden = self.encoder.embed(tokens)
        for block in self.encoder.blocks:
            hidden = block(hidden)
        return self.to_bins(self.encoder.norm(hidden)) + self.gene_bias

    def loss(self, bins: Tensor, measured: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
        """Mean cross entropy at places drawn by `masked_places`: bins (B, G), measured (B, G) bool -> scalar."""
        places = masked_places(measured, fraction, generator)
        masked = torch.rand(bins.shape, generator=generator, device=bins.device) < MASKED_FRACTION
        return masked_loss(self(hide(bins, places & masked)), bins, places)

    def log_probabilities(self, bins: Tensor, places: Tensor) -> Tensor:
        """Log probabilities with all of `places` masked: bins (B, G), places (B, G) bool -> (B, G, V) float32."""
        return self(hide(bins, places)).float().log_softmax(-1)

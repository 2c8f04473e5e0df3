"""Plain references of speed.py: the published method with its equations written down directly.

fp32, one thing after the other: kernel features of all heads and tokens at once, every temporary kept for backward;
each image encoded alone; each candidate of a retrieval encoded anew; the frozen encoder run in every epoch. Tests
compare each with the fast path's numbers.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import losses
from model.fusion import draw_negatives
from model.gene_encoder import GeneEncoder
from model.performer import EPSILON, PerformerBlock
from model.stage_one import StageOne
from model.stage_two import StageTwo

Model = TypeVar("Model", bound=nn.Module)


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """FAVOR+ as in Choromanski et al. 2021: q, k, v (B, H, N, E), projection (M, E) -> (B, H, N, E)."""
    scale = q.shape[-1] ** -0.25

    def features(x: Tensor, over: tuple[int, ...]) -> Tensor:
        to_random = torch.einsum("bhne,me->bhnm", x * scale, projection)
        size = (x * scale).square().sum(-1, keepdim=True) / 2
        return torch.exp(to_random - size - to_random.amax(over, keepdim=True).detach()) + EPSILON

    queries, keys = features(q, (-1,)), features(k, (1, 2, 3))
    normaliser = torch.einsum("bhnm,bhm->bhn", queries, keys.sum(2))
    context = torch.einsum("bhnm,bhne->bhme", keys, v)
    return torch.einsum("bhnm,bhme->bhne", queries, context) / normaliser.unsqueeze(-1)


class PlainBlock(nn.Module):
    """A Performer block around another's weights: (B, N, D) -> (B, N, D)."""

    def __init__(self, block: PerformerBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        b, normed = self.block, self.block.norm_attention(x)
        q, k, v = (to(normed).unflatten(-1, (b.heads, -1)).transpose(1, 2) for to in (b.to_q, b.to_k, b.to_v))
        x = x + b.to_out(favor_attention(q, k, v, b.projection).transpose(1, 2).flatten(2))
        return x + b.w2(F.gelu(b.w1(b.norm_mlp(x))))


def shallow_copy(module: Model) -> Model:
    """The same module, its parameters shared, whose parts can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def plain_gene_encoder(encoder: GeneEncoder) -> GeneEncoder:
    plain, blocks = shallow_copy(encoder), cast(list[PerformerBlock], encoder.blocks)
    plain.blocks = nn.ModuleList(PlainBlock(block) for block in blocks)
    return plain


def plain_model(model: Model) -> Model:
    """Stage one or two with plain encoders: attention of the ViT writes its weights out, that of the genes its kernel
    features. The loss of stage one is then `stage_one_loss`."""
    plain: Any = shallow_copy(model)
    plain.image_encoder = shallow_copy(plain.image_encoder)
    plain.image_encoder.trunk = copy.deepcopy(plain.image_encoder.trunk)
    for module in plain.image_encoder.trunk.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if hasattr(plain, "gene_encoder"):
        plain.gene_encoder = plain_gene_encoder(plain.gene_encoder)
    return plain


def stage_one_loss(model: StageOne, tiles: Tensor, bins: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast within the batch, without distillation, and matching of three pairs a spot: (B, 3, Z, Z), (B, G)."""
    image, image_tokens = model.encode_images(tiles)
    gene, gene_tokens = model.encode_genes(bins)
    logits = image @ gene.T * model.contrast.logit_scale.exp()
    spots = torch.arange(len(tiles), device=tiles.device)
    contrast = (F.cross_entropy(logits, spots) + F.cross_entropy(logits.T, spots)) / 2
    wrong_gene, wrong_image = (draw_negatives(spots, 1, generator)[:, 0] for _ in range(2))
    pairs = model.fusion(
        torch.cat([gene_tokens, gene_tokens[wrong_gene], gene_tokens]),
        torch.cat([image_tokens, image_tokens, image_tokens[wrong_image]]),
    )
    return contrast + losses.matching_loss(pairs, torch.arange(len(pairs), device=pairs.device) < len(tiles))


@torch.no_grad()
def retrieval_scores(model: StageOne, tiles: Tensor, bins: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Scores (S, K) of the first S spots' images with their candidates (S, K), each profile encoded anew."""
    contrastive, matching = torch.zeros(candidates.shape), torch.zeros(candidates.shape)
    for spot, row in enumerate(candidates):
        image, image_tokens = model.encode_images(tiles[spot : spot + 1])
        for column, candidate in enumerate(row):
            gene, gene_tokens = model.encode_genes(bins[candidate : candidate + 1])
            contrastive[spot, column] = (image * gene).sum() * model.contrast.logit_scale.exp()
            matching[spot, column] = model.fusion(gene_tokens, image_tokens)
    return {
        "contrastive": contrastive,
        "matching": matching,
        "reranked": matching + contrastive.log_softmax(1),
    }


def stage_two_step(
    model: StageTwo, tiles: Tensor, around: dict[str, Tensor], target: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """One batch: the frozen encoder, then the decoder and its gradient. `around` is the context that decoders take."""
    features = model.encode(tiles)
    loss = losses.expression_loss(model.decoder(**model.split(features), **around), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def predict(model: StageTwo, tiles: Tensor, around: dict[str, Tensor]) -> Tensor:
    """One image at a time: (S, 3, Z, Z) -> (S, G)."""
    predicted = []
    for i in range(len(tiles)):
        features = model.encode(tiles[i : i + 1])
        context = {name: rows[i : i + 1] for name, rows in around.items()}
        predicted.append(model.predict(model.split(features) | context))
    return torch.cat(predicted)

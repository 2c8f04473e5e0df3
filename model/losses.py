"""Pure functions of tensors, one per equation of the method.

Li et al. 2021 (ALBEF), arXiv 2107.07651, equations 1, 2, 4 and 6. Letters: B batch, M candidates (batch and queue),
G genes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def same_spot_onehot(spots: Tensor, candidates: Tensor) -> Tensor:
    """1/m on each of the m candidates of the query's spot: ids (B,), (M,) -> (B, M), rows sum to 1.

    A spot may be in the queue as well as in the batch; it is then a positive twice, never a negative.
    """
    same = (spots[:, None] == candidates[None, :]).float()
    return same / same.sum(1, keepdim=True)


def distilled_target(logits_m: Tensor, onehot: Tensor, alpha: float) -> Tensor:
    """alpha softmax(s_m) + (1 - alpha) onehot (eq. 6): (B, M), (B, M) -> (B, M), rows sum to 1."""
    return alpha * logits_m.float().softmax(1) + (1 - alpha) * onehot


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum target log softmax(logits): (B, M), (B, M) -> scalar."""
    return -(target * logits.float().log_softmax(1)).sum(1).mean()


def matching_loss(logits: Tensor, is_pair: Tensor) -> Tensor:
    """Binary cross entropy of image-gene matching (eq. 4): (B,), (B,) bool -> scalar."""
    return F.binary_cross_entropy_with_logits(logits.float(), is_pair.float())


def pair_auc(pairs: Tensor, others: Tensor) -> Tensor:
    """Area under the ROC curve, how often a pair's logit is above a non-pair's, ties half: (B,), (N,) -> scalar."""
    difference = pairs.detach()[:, None] - others.detach()[None, :]
    return (difference.sign().mean() + 1) / 2


def expression_loss(predicted: Tensor, measured: Tensor) -> Tensor:
    """Mean squared error over the entries that were measured (NaN marks the others): (B, G), (B, G) -> scalar."""
    known = torch.isfinite(measured)
    difference = torch.where(known, predicted.float() - measured.nan_to_num(), 0.0)
    return difference.square().sum() / known.sum().clamp(min=1)

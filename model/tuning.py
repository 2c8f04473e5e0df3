"""Which layers of the image encoder train (`--tune`), and at which learning rate (`--layer_decay`).

Layers are timm's own (`group_matcher`): a stem, blocks, and the layers after them. All that a ViT does before its
blocks is its stem; timm 1.0.20 does not say so of registers and of the norm before the blocks. Torch is imported late,
so that a script can check its flags with `choice`.
"""

from __future__ import annotations

import argparse
import re
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from model.image_encoder import ImageEncoder


BEFORE_BLOCKS = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed.", "norm_pre.")  # of a ViT


def choice(text: str) -> str:
    """The type of --tune."""
    if not re.fullmatch(r"all|norm|none|last:[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected all, none, norm or last:N with N from 1, found {text!r}")
    return text


def layers(trunk: Any) -> tuple[dict[str, int], int]:
    """Layer of every parameter by name, 0 the stem, and the number of the first layer after the blocks."""
    from timm.models import group_parameters

    if not hasattr(trunk, "group_matcher"):
        raise ValueError(
            f"--tune, --layer_decay: expected a timm model with layers in order, found {type(trunk).__name__} without; "
            "use --tune all, norm or none, and --layer_decay 1"
        )
    named = chain(trunk.named_parameters(), [("/after", None)])  # a name that no block has
    with_after: Any = SimpleNamespace(named_parameters=lambda: named)
    layer_of: Any = group_parameters(with_after, trunk.group_matcher(coarse=False), reverse=True)
    n_layers = layer_of.pop("/after")
    if is_plain_vit(trunk):
        layer_of |= {name: 0 for name in layer_of if name.startswith(BEFORE_BLOCKS)}
        n_layers = 1 + len(trunk.blocks)
    return layer_of, n_layers


def is_plain_vit(trunk: Any) -> bool:
    """Whether it is timm's VisionTransformer, or computes as it does: stem, blocks and norm, one after the other."""
    from timm.models import VisionTransformer

    return getattr(type(trunk), "forward_features", None) is VisionTransformer.forward_features


def tune(encoder: ImageEncoder, what: str) -> None:
    """Freeze the trunk except `what`: "all", "none", "norm" (norm layers), or "last:N" (N blocks and what follows).

    The projections `to_vector` and `to_token` always train. Reset momentum encoders afterwards: they share what is
    frozen.
    """
    trunk = encoder.trunk
    trunk.requires_grad_(what == "all")
    if what.startswith("last:"):
        layer_of, n_layers = layers(trunk)
        first = n_layers - int(what.removeprefix("last:"))
        if first < 1:
            raise ValueError(
                f"--tune: expected at most last:{n_layers - 1}, the blocks of this encoder, found {what}; lower it, or "
                "use all"
            )
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(layer_of[name] >= first)
    if what == "norm":
        norms = [m for m in trunk.modules() if "norm" in type(m).__name__.lower()]
        affine = [p for norm in norms for p in norm.parameters(recurse=False)]
        if not affine:
            raise ValueError("--tune norm: expected an encoder with norm layers, found none; use last:N, none or all")
        for parameter in affine:
            parameter.requires_grad_(True)
    encoder.n_frozen = n_frozen_blocks(trunk)
    encoder.train(encoder.training)  # frozen parts change to evaluation mode


def n_frozen_blocks(trunk: Any) -> int:
    """Blocks of a plain ViT before the first that trains, 0 if its stem trains; 0 for other trunks."""
    if not is_plain_vit(trunk):
        return 0
    layer_of, n_layers = layers(trunk)
    trained = (layer_of[name] for name, parameter in trunk.named_parameters() if parameter.requires_grad)
    return max(min(trained, default=n_layers) - 1, 0)


def rate_fractions(encoder: ImageEncoder, decay: float) -> dict[nn.Parameter, float]:
    """Fraction of the learning rate for each parameter of the trunk: decay^i for the i-th layer below the projections.

    Empty where decay is 1. Clark et al. 2020 (ELECTRA), arXiv 2003.10555; the powers are those of BEiT and timm.
    """
    if decay == 1:
        return {}
    layer_of, n_layers = layers(encoder.trunk)
    return {parameter: decay ** (n_layers - layer_of[name]) for name, parameter in encoder.trunk.named_parameters()}

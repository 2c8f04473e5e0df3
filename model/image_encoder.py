"""I(.): any timm model as an encoder of tiles into tokens and one vector.

Weights come from timm's hub, from a state dict, or are drawn anew. Letters: B batch, P tokens, C width of the trunk,
D shared width, Z tile side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor] | str | None  # a state dict, "timm" for the hub's, None for random


def build_trunk(name: str, image_size: int, weights: Weights) -> Any:
    """The timm model without its classifier, its weights loaded strictly.

    Raises ValueError where timm knows no such model, the hub cannot be reached, or the state dict is another model's.
    """
    import timm

    if not timm.is_model(name) and not name.startswith("hf-hub:"):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(
            f"--image_encoder {name}: expected a name that timm knows, found none (near it: {near or '-'})"
        )
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    size: dict[str, Any] = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    if weights is None:
        return timm.create_model(name, pretrained=False, num_classes=0, **size)
    overlay: dict[str, Any] = {}
    if isinstance(weights, dict):
        blank: Any = timm.create_model(name, pretrained=False, **size)
        names = blank.pretrained_cfg["classifier"]
        heads = tuple(f"{head}." for head in ([names] if isinstance(names, str) else names))
        overlay["state_dict"] = {k: v for k, v in blank.state_dict().items() if k.startswith(heads)} | weights
    try:  # with the classifier in place timm loads strictly; without it, it would skip what does not fit
        trunk: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size)
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"--image_weights do not fit {name}: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:  # what the hub's client raises without a network is one
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"--image_weights timm: {name} cannot be downloaded ({reason}); give a .pth or .safetensors file, or none"
        ) from error
    trunk.reset_classifier(0)
    return trunk


def pool_grid(tokens: Tensor, n_prefix: int, side: int) -> Tensor:
    """Average the square grid of tokens behind `n_prefix` class tokens down to side x side; a smaller grid stays.

    Shapes: (B, n_prefix + p * p, C) -> (B, n_prefix + min(p, side)^2, C).
    """
    grid = tokens[:, n_prefix:]
    p = math.isqrt(grid.shape[1])
    if p <= side:
        return tokens
    pooled = F.adaptive_avg_pool2d(grid.transpose(1, 2).unflatten(2, (p, p)), side)
    return torch.cat([tokens[:, :n_prefix], pooled.flatten(2).transpose(1, 2)], dim=1)


class ImageEncoder(nn.Module):
    """Tiles to a vector in the shared space, and to tokens.

    `forward`: tiles (B, 3, Z, Z) in 0..1 -> vector (B, D) before normalisation, raw tokens (B, P, C). Raw tokens are
    pooled first and projected to D by `project_tokens`: the mean of projections is the projection of the mean.
    BatchNorm of a pretrained convolutional trunk stays in evaluation mode, its affine part trained.

    With several `scales`, shares of the tile's side, the trunk sees as many squares around the tile's centre, all at
    the pixels of the smallest: `--scales 1 0.5` is the tile at half its resolution, and its middle at the whole. Their
    pooled features stand side by side; the tokens are those of the first.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        width: int,
        weights: Weights = None,
        pretrained: bool = False,
        scales: Sequence[float] = (1.0,),
    ):
        super().__init__()
        self.scales, self.side = scales, round(image_size * min(scales))
        self.trunk: Any = build_trunk(name, self.side, weights)
        self.pretrained = pretrained or weights is not None
        config = self.trunk.pretrained_cfg
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
        self.n_prefix = int(getattr(self.trunk, "num_prefix_tokens", 0))
        self.to_vector = nn.Linear(len(scales) * self.trunk.head_hidden_size, width)
        self.to_token = nn.Linear(self.trunk.num_features, width)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode)
        if self.pretrained:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def features(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk alone, as its authors left it: pooled features (B, scales * C'), tokens (B, P, C)."""
        seen = torch.cat([self._square(tiles, scale) for scale in self.scales])
        raw = self.trunk.forward_features((seen - self.mean) / self.std)
        pooled = self.trunk.forward_head(raw, pre_logits=True).unflatten(0, (len(self.scales), -1))
        pooled, raw = pooled.transpose(0, 1).flatten(1), raw[: len(tiles)]
        if raw.ndim == 4:  # a feature map, NCHW or (swin) NHWC
            raw = raw.flatten(2).transpose(1, 2) if raw.shape[1] == self.trunk.num_features else raw.flatten(1, 2)
        return pooled, raw

    def _square(self, tiles: Tensor, scale: float) -> Tensor:
        """The square around the tiles' centre with a share of their side, as the trunk takes it: (B, 3, side, side)."""
        whole = tiles.shape[-1]
        cut = round(whole * scale)
        start = (whole - cut) // 2
        square = tiles[..., start : start + cut, start : start + cut]
        if cut == self.side or len(self.scales) == 1:
            return square
        size = (self.side, self.side)
        return F.interpolate(square, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        pooled, tokens = self.features(tiles)
        return self.to_vector(pooled), tokens

    def project_tokens(self, tokens: Tensor, at_most: int) -> Tensor:
        """Raw tokens (B, P, C) -> (B, P' <= at_most, D), class tokens kept, the grid pooled to a smaller square."""
        if at_most <= self.n_prefix:
            raise ValueError(f"--image_tokens {at_most}: expected more than the encoder's {self.n_prefix} class tokens")
        side = math.isqrt(at_most - self.n_prefix)
        return self.to_token(pool_grid(tokens, self.n_prefix, side))

    def grid_tokens(self, tokens: Tensor, side: int) -> Tensor:
        """Raw tokens (B, P, C) -> the grid alone, pooled to at most side x side and projected: (B, <= side^2, D)."""
        return self.to_token(pool_grid(tokens[:, self.n_prefix :], 0, side))

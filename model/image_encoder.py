"""I(.): any timm model as an encoder of tiles into tokens and one vector.

Weights come from timm's hub or from a file, or are random. Letters: B batch, P tokens, C width of the trunk, D shared
width, Z tile side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import image_weights
from model.image_weights import WeightsReport
from utils import words

Weights = dict[str, Any] | str | None  # content of a file, tensors at any depth; "timm" for the hub's; None for random


@dataclass(frozen=True)
class Plan:
    """How timm builds a trunk: architecture, arguments, changes to its configuration, id on the hub."""

    name: str
    architecture: str
    arguments: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    hub: str = ""

    def build(self) -> Any:
        """The trunk, with random weights and without a classifier."""
        import timm

        config = dict(self.config)
        return timm.create_model(self.architecture, pretrained_cfg_overlay=config, num_classes=0, **self.arguments)

    def load(self, weights: dict[str, Tensor]) -> Any:
        """The trunk with all its weights, through timm's own conversions.

        It has a classifier of zeros meanwhile: without one timm would skip tensors that do not fit, and would not
        recognise some of its own layouts.
        """
        import timm

        config: dict[str, Any] = self.config | {"label_offset": 0}
        with torch.device("meta"):
            whole: Any = timm.create_model(self.architecture, pretrained_cfg_overlay=config, **self.arguments)
        names = whole.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([names] if isinstance(names, str) else names))
        zeros = {k: torch.zeros(v.shape) for k, v in whole.state_dict().items() if k.startswith(heads)}
        config["state_dict"] = weights | zeros
        trunk: Any = timm.create_model(
            self.architecture, pretrained=True, pretrained_cfg_overlay=config, **self.arguments
        )
        del trunk.pretrained_cfg["state_dict"]  # it would be copied with every momentum encoder
        trunk.reset_classifier(0)
        return trunk


def plan(name: str, image_size: int) -> Plan:
    """Raises ValueError where timm and the hub know no model of that name, or the hub denies access."""
    import timm

    if name.startswith(image_weights.HUB):
        return of_the_hub(name, name.split(":", 1)[1], image_size)
    if not timm.is_model(name):
        near = words.nearest(name.split(".")[0], timm.list_models(), most=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models() or docs/encoders.md"
        hint = f"for a model of the hub give hf-hub:{name}" if "/" in name else hint
        raise ValueError(f"--image_encoder: expected a model that timm knows, found {name}; {hint}")
    try:
        return Plan(name, name, size_of(name, image_size))
    except RuntimeError as error:  # of weights that timm does not have of the model, named after its dot
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(
            f"--image_encoder: expected weights that timm knows, found {name}; use one of {', '.join(known) or 'none'}"
        ) from error


def size_of(architecture: str, image_size: int) -> dict[str, Any]:
    import timm

    config = timm.models.get_pretrained_cfg(architecture)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def of_the_hub(name: str, hub: str, image_size: int) -> Plan:
    import timm

    known = image_weights.PUBLISHED.get(hub.split("@")[0].lower())
    if known is not None:
        mlp = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU} if known.swiglu else {}
        arguments = known.arguments | mlp | size_of(known.architecture, image_size)
        return Plan(name, known.architecture, arguments, dict(zip(("mean", "std"), known.mean_sd, strict=True)), hub)
    try:
        with image_weights.asking_the_hub(hub):
            hub_config, architecture, arguments = timm.models.load_model_config_from_hf(hub)
    except (OSError, ValueError) as error:
        raise image_weights.hub_failure(error, name, hub) from error
    except KeyError:
        architecture = ""
    if not timm.is_model(architecture):
        raise ValueError(
            f"--image_encoder {name}: expected a config.json that names a timm model, found "
            f"{architecture or 'no name'}; give the timm model's name instead, and the file as --image_weights FILE"
        )
    arguments = {k: v for k, v in arguments.items() if k not in ("num_classes", "img_size") and v != ""}
    config = {k: hub_config[k] for k in ("mean", "std", "interpolation", "input_size") if k in hub_config}
    return Plan(name, architecture, arguments | size_of(architecture, image_size), config, hub)


def build_trunk(name: str, image_size: int, weights: Weights) -> tuple[Any, WeightsReport | None]:
    """The timm model without its classifier, its weights loaded strictly, and what was loaded.

    Raises ValueError where timm knows no such model, the hub cannot be reached, or the state dict is another model's.
    """
    import timm

    model_plan = plan(name, image_size)
    if weights is None:
        return model_plan.build(), None
    if isinstance(weights, dict):
        return fill(model_plan, weights, getattr(weights, "source", "given"))
    if not model_plan.hub:
        return download(model_plan, image_size)
    try:
        with image_weights.asking_the_hub(model_plan.hub):
            tensors = timm.models.load_state_dict_from_hf(model_plan.hub)
    except OSError as error:
        raise image_weights.hub_failure(error, name, model_plan.hub) from error
    return fill(model_plan, tensors, model_plan.hub)


def fill(model_plan: Plan, content: dict[str, Any], source: str) -> tuple[Any, WeightsReport]:
    """The trunk with the tensors of a file, at any depth, in a layout that image_weights or timm knows."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in model_plan.build().state_dict().items()}
    try:
        chosen = image_weights.choose_tensors(content, shapes)
        source += f" ({chosen.where})" if chosen.where else ""
        kept, skipped = image_weights.select(chosen, shapes)
        if not kept:
            raise ValueError(f"{len(chosen.tensors)} tensors, none of a trunk")
        trunk = model_plan.load(kept)
        resized = image_weights.resized(kept, shapes)
    except Exception as error:  # timm's conversions raise anything on another model's tensors
        raise ValueError(
            f"--image_weights: expected weights of {model_plan.name}, found in {source}: "
            f"{image_weights.misfit(error)}; give the --image_encoder that the file was saved from"
        ) from error
    return trunk, WeightsReport(source, len(shapes), skipped, resized)


def download(model_plan: Plan, image_size: int) -> tuple[Any, WeightsReport]:
    """The weights that timm itself has for its model."""
    import timm

    try:  # with the classifier in place timm loads strictly; without it, it would skip what does not fit
        with image_weights.asking_the_hub(f"timm/{model_plan.name}"):
            trunk: Any = timm.create_model(model_plan.architecture, pretrained=True, **model_plan.arguments)
    except RuntimeError as error:
        raise ValueError(
            f"--image_weights timm: expected weights of {model_plan.name}, found none ({words.cut(error)}); give a "
            "file, or none"
        ) from error
    except OSError as error:  # raised by the hub's client without a network
        raise image_weights.hub_failure(error, model_plan.name, f"timm/{model_plan.name}") from error
    trunk.reset_classifier(0)
    size = trunk.pretrained_cfg["input_size"][-1]
    resized = (f"position embeddings {size} -> {image_size} px",) if model_plan.arguments and size != image_size else ()
    return trunk, WeightsReport(f"timm/{model_plan.name}", len(trunk.state_dict()), (), resized)


def to_float(tiles: Tensor, size: int) -> Tensor:
    """uint8 (B, Z, Z, 3) -> float32 (B, 3, size, size) in 0..1, resized with antialiasing where Z differs."""
    return resized(tiles.permute(0, 3, 1, 2).float().div_(255), size)


def resized(tiles: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing: (B, 3, Z, Z) -> (B, 3, size, size), both in 0..1."""
    if tiles.shape[-1] == size:
        return tiles
    return F.interpolate(tiles, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)


def pool_grid(tokens: Tensor, n_prefix: int, side: int) -> Tensor:
    """Average the square grid of tokens after `n_prefix` class tokens down to side x side; a smaller grid stays.

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
    pooled first and then projected to D: the mean of projections is the projection of the mean. BatchNorm of a
    pretrained convolutional trunk stays in evaluation mode, its affine part trained; frozen parts of the trunk
    (model/tuning.py) stay in evaluation mode altogether. `weights_report` tells what was loaded.

    With several `crop_scales`, fractions of the tile's side, the trunk encodes one centred square per scale, each
    resized to the pixels of the smallest: `--crop_scales 1 0.5` is the tile at half its resolution, and its middle at
    the full resolution. Their pooled features are concatenated; the tokens are those of the first.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        width: int,
        weights: Weights = None,
        pretrained: bool = False,
        crop_scales: Sequence[float] = (1.0,),
    ):
        super().__init__()
        self.crop_scales, self.side = crop_scales, round(image_size * min(crop_scales))
        self.trunk: Any
        self.trunk, self.weights_report = build_trunk(name, self.side, weights)
        self.trunk.to(memory_format=torch.channels_last)  # convolutions are faster in it
        self.depthwise = any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in self.trunk.modules())
        self.pretrained = pretrained or weights is not None
        config = self.trunk.pretrained_cfg
        interpolation = config.get("interpolation")  # timm has "random" for some models in training
        self.interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
        self.n_prefix = int(getattr(self.trunk, "num_prefix_tokens", 0))
        self.to_vector = nn.Linear(len(crop_scales) * self.trunk.head_hidden_size, width)
        self.to_token = nn.Linear(self.trunk.num_features, width)
        self.n_frozen = 0  # blocks of a plain ViT before the first that trains, set by model/tuning.py

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode)
        if self.pretrained:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for module in self.trunk.modules():  # frozen modules have no dropout, and keep their statistics
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    @torch.no_grad()
    def frozen_part(self, tiles: Tensor) -> Tensor | None:
        """Output (scales * B, P, C) of the frozen blocks, shared with the momentum encoder; None without any."""
        if self.n_frozen == 0:
            return None
        trunk = self.trunk
        hidden = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(self._crops(tiles)))))
        for block in trunk.blocks[: self.n_frozen]:
            hidden = block(hidden)
        return hidden

    def features(self, tiles: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The trunk alone: tiles (B, 3, Z, Z) -> pooled features (B, scales * C'), tokens (B, P, C). `frozen` saves a
        second run of `frozen_part`."""
        with self._precision(tiles):
            raw = self.trunk.forward_features(self._crops(tiles)) if frozen is None else self._after(frozen)
            pooled = self.trunk.forward_head(raw, pre_logits=True).unflatten(0, (len(self.crop_scales), -1))
        pooled, raw = pooled.transpose(0, 1).flatten(1), raw[: len(tiles)]
        if raw.ndim == 4:  # a feature map, NCHW or (swin) NHWC
            raw = raw.flatten(2).transpose(1, 2) if raw.shape[1] == self.trunk.num_features else raw.flatten(1, 2)
        return pooled, raw

    def _after(self, hidden: Tensor) -> Tensor:
        """What timm's ViT does after its frozen blocks."""
        for block in self.trunk.blocks[self.n_frozen :]:
            hidden = block(hidden)
        return self.trunk.norm(hidden)

    def _crops(self, tiles: Tensor) -> Tensor:
        """Tiles (B, 3, Z, Z) -> what the trunk reads, one scale after the other: (scales * B, 3, side, side)."""
        crops = torch.cat([self._square(tiles, scale) for scale in self.crop_scales])
        return ((crops - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def _precision(self, tiles: Tensor) -> AbstractContextManager[Any]:
        """fp32 for the training of depthwise convolutions on a CPU, where their gradients are slower in bf16."""
        slow = self.depthwise and tiles.device.type == "cpu" and torch.is_grad_enabled()
        return torch.autocast("cpu", enabled=False) if slow else nullcontext()

    def _square(self, tiles: Tensor, scale: float) -> Tensor:
        """The centred square of `scale` times the tile's side, resized for the trunk: (B, 3, side, side)."""
        crop_px = round(tiles.shape[-1] * scale)
        first = (tiles.shape[-1] - crop_px) // 2
        square = tiles[..., first : first + crop_px, first : first + crop_px]
        if crop_px == self.side or len(self.crop_scales) == 1:
            return square
        size = (self.side, self.side)
        return F.interpolate(square, size, mode=self.interpolation, antialias=True, align_corners=False).clamp(0, 1)

    def forward(self, tiles: Tensor, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled, tokens = self.features(tiles, frozen)
        return self.to_vector(pooled), tokens

    def project_tokens(self, tokens: Tensor, at_most: int) -> Tensor:
        """Raw tokens (B, P, C) -> (B, P' <= at_most, D), class tokens kept, the grid pooled to a smaller square."""
        if at_most <= self.n_prefix:
            raise ValueError(
                f"--image_tokens: expected more than the encoder's {self.n_prefix} class and register tokens, found "
                f"{at_most}; raise it"
            )
        side = math.isqrt(at_most - self.n_prefix)
        return self.to_token(pool_grid(tokens, self.n_prefix, side))

    def grid_tokens(self, tokens: Tensor, side: int) -> Tensor:
        """Raw tokens (B, P, C) -> the grid alone, pooled to at most side x side and projected: (B, <= side^2, D)."""
        return self.to_token(pool_grid(tokens[:, self.n_prefix :], 0, side))

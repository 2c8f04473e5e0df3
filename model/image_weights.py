"""Published weights for I(.): encoders of the hub and how to build them, the layouts of files, what was loaded.

timm resamples position embeddings itself, in two dimensions and class and register tokens apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
HUB = ("hf-hub:", "hf_hub:")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class Published:
    """A model of the hub as timm builds it: architecture and arguments, mean and deviation of each colour.

    Its authors' cards ask for arguments that a config.json cannot hold or leaves out. With them here nothing but the
    weights is downloaded, and a file that is at hand needs no network.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    mean_sd: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    swiglu: bool = False


# By lower-case id. Sources: the cards at huggingface.co/<id>, for those that are gated the published code of TRIDENT.
PUBLISHED = {
    "mahmoodlab/uni": Published("vit_large_patch16_224", {"init_values": 1e-5}),
    "mahmoodlab/uni2-h": Published(
        "vit_giant_patch14_224",
        {
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
        },
        swiglu=True,
    ),
    "mahmoodlab/conch": Published("vit_base_patch16_224", mean_sd=CLIP),
    "paige-ai/virchow2": Published(
        "vit_huge_patch14_224", {"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375}, swiglu=True
    ),
    "bioptimus/h-optimus-0": Published("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5}, BIOPTIMUS),
    "bioptimus/h0-mini": Published(
        "vit_base_patch14_reg4_dinov2", {"init_values": 1e-5, "mlp_ratio": 5.33334}, BIOPTIMUS, swiglu=True
    ),
    "prov-gigapath/prov-gigapath": Published("vit_giant_patch14_dinov2", {"patch_size": 16, "mlp_ratio": 5.33334}),
    "owkin/phikon-v2": Published("vit_large_patch16_224", {"init_values": 1.0}),
}


@dataclass(frozen=True)
class WeightsReport:
    """What came of a file of weights; nothing of the trunk is ever missing."""

    source: str
    loaded: int
    skipped: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        skipped = f"skipped {len(self.skipped)}{in_brackets(self.skipped)}"
        resized = f"resized {len(self.resized)}{in_brackets(self.resized)}"
        return f"image weights {self.source}: loaded {self.loaded} tensors, missing 0, {skipped}, {resized}"


def in_brackets(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    rest = ["..."] if len(names) > most else []
    return f" ({', '.join([*names[:most], *rest])})" if names else ""


# ---- layouts

PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "teacher", "trunk", "visual")
HEADS = re.compile(
    r"(heads?|head_dist|fc|fc_norm|classifier|pre_logits|pooler|mlp|last_layer|mask_token|logit_scale|projection"
    r"|projector|predictor|dino_head|ibot_head|decoder\w*)(\.|$)"
)
TRANSFORMERS = (  # names in the library of that name (ViT, DINOv2) -> timm's, or DINOv2's own, which timm reads
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)


def from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the layout of the library transformers under timm's names; those of any other layout as they are."""
    anchor = "embeddings.patch_embeddings.projection.weight"
    prefix = next((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), None)
    if prefix is None:
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        for theirs, ours in TRANSFORMERS:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(name.replace("query", part), torch.empty(0)) for part in ("query", "key", "value")]
        if len({part.shape for part in parts}) == 1:
            renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def find_prefix(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands before the trunk's names in a file: the chain of PREFIXES under which most are found, "" if none."""
    names, wanted, chains = set(names), list(wanted), {""}
    for name in names:
        chain = ""
        for part in name.split("."):
            if part not in PREFIXES:
                break
            chain += f"{part}."
            chains.add(chain)
    return max(sorted(chains, key=len), key=lambda chain: sum(chain + name in names for name in wanted))


def select(tensors: dict[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors for a trunk of these names and shapes, and the names in the file that are skipped: heads, and what
    stands beside the trunk. Other names that the trunk does not have are kept: timm may convert them, or will refuse.
    """
    tensors = from_transformers(tensors)
    prefix = find_prefix(tensors, shapes)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    kept = {name: tensor for name, tensor in inside.items() if name in shapes or not HEADS.match(name)}
    skipped = [name for name in tensors if not (name.startswith(prefix) and name.removeprefix(prefix) in kept)]
    if "mask_token" in inside and ("register_tokens" in kept or any(".mlp.w12." in name for name in kept)):
        kept["mask_token"] = inside["mask_token"]  # by which timm knows DINOv2's own layout
    return kept, tuple(skipped)


def resized(kept: dict[str, Tensor], shapes: Shapes) -> tuple[str, ...]:
    """Names with old and new shape of what timm resampled. Raises ValueError for other than position embeddings."""
    changed = [name for name, tensor in kept.items() if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape))]
    for name in changed:  # timm would fit patches of another size as well: that is another model
        if "pos" not in name and kept[name].numel() != torch.Size(shapes[name]).numel():
            raise ValueError(f"1 tensor of another shape ({name} {list(kept[name].shape)}, not {list(shapes[name])})")
    by = ("x".join(map(str, shape)) for name in changed for shape in (kept[name].shape, shapes[name]))
    return tuple(f"{name} {old} -> {new}" for name, old, new in zip(changed, by, by, strict=True))


# ---- what went wrong


def misfit(error: Exception) -> str:
    """What torch's strict loading says over many lines, in one."""
    text = " ".join(str(error).split())
    found = []
    for title, what in (("Missing", "missing"), ("Unexpected", "unknown")):
        listed = re.search(rf'{title} key\(s\) in state_dict: ((?:"[^"]+"(?:, )?)+)', text)
        names = re.findall(r'"([^"]+)"', listed[1]) if listed else []
        found += [f"{len(names)} {what}{in_brackets(names, 3)}"] if names else []
    sizes = re.findall(r"size mismatch for (\S+): copying a param with shape [\w.]+\(([^)]*)\).*?\(([^)]*)\)", text)
    sizes = [f"{name} {old}, not {new}" for name, old, new in sizes]
    found += [f"{len(sizes)} of another shape{in_brackets(sizes, 2)}"] if sizes else []
    return ", ".join(found) or text[:200]


def hub_failure(error: Exception, name: str, hub: str) -> ValueError:
    """One line on why the hub gave nothing, with what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    file = "give it as --image_weights FILE"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return ValueError(
            f"--image_encoder {name} is gated, or there is no such model: accept its licence at "
            f"https://huggingface.co/{hub}, then `hf auth login` (or set HF_TOKEN); or download its file and {file}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(f"--image_encoder {name}: expected a model at https://huggingface.co/{hub}, found none")
    reason = " ".join(str(error).split())[:160]
    return ValueError(
        f"--image_weights timm: {name} cannot be downloaded ({reason}); give a .pth or .safetensors file, or none"
    )

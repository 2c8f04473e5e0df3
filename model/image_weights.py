"""Published weights for I(.): how timm builds known encoders of the hub, and which tensors of a file are a trunk's.

timm itself resamples position embeddings.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from utils import words

Shapes = Mapping[str, tuple[int, ...]]
HUB = ("hf-hub:", "hf_hub:")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class Published:
    """A model of the hub as timm builds it: architecture and arguments, mean and deviation of each colour.

    The authors' cards require arguments that a config.json cannot hold or leaves out. As they are listed here, only the
    weights are downloaded, and a local file needs no network.
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
    """Tensors loaded from a file of weights; those of the trunk are always complete."""

    source: str  # the file, and in brackets the place of the tensors in it
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

WRAPPERS = ("module", "_orig_mod", "model", "backbone", "encoder", "trunk", "visual")
KINDS = (  # of several sets of weights the first of these kinds is taken, before any other
    re.compile(
        r"(^|[._]|model|net|weights)(ema|momentum|averaged?|avg|swa|polyak|shadow|encoder_k|key_encoder)([._]|$)",
        re.IGNORECASE,
    ),
    re.compile(r"(^|[._])(teacher|target)([._]|$)", re.IGNORECASE),
    re.compile(r"(^|[._])(student|online|encoder_q|query_encoder|base_encoder)([._]|$)", re.IGNORECASE),
)
LEAST_MATCHING = 0.1  # of the trunk's names: a few, such as norm.weight, are found in the blocks of any network
NO_TRUNK = re.compile(r"(^|[._])(optim\w*|\w*sched\w*|scaler|\w*loss|text\w*|language\w*)([._]|$)", re.IGNORECASE)
HEADS = re.compile(
    r"(heads?|head_dist|fc|fc_norm|classifier|pre_logits|pooler|mlp|last_layer|mask_token|logit_scale|projection"
    r"|projector|predictor|dino_head|ibot_head|decoder\w*)(\.|$)"
)
TRANSFORMERS = (  # names in the library transformers (ViT, DINOv2) -> timm's, or DINOv2's own, which timm converts
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


ANCHOR = "embeddings.patch_embeddings.projection.weight"  # in the layout of transformers


@dataclass(frozen=True)
class TensorSet:
    """Tensors of a file that may be a trunk's, under the trunk's names."""

    path: str  # keys of the nested dicts that lead to them
    prefix: str  # what stood before their names
    tensors: dict[str, Tensor]
    beside: tuple[str, ...]  # other names of the same dict
    n_matching: int  # names that the trunk has too

    @property
    def where(self) -> str:
        """Path and prefix, "" where they lie at the top under their own names."""
        return ": ".join(filter(None, (self.path, self.prefix and f"{self.prefix}*")))

    @property
    def preference(self) -> tuple[int, int, str]:
        kind = next((i for i, words in enumerate(KINDS) if words.search(f"{self.path}.{self.prefix}")), len(KINDS))
        return kind, len(self.where), self.where


def choose_tensors(content: Mapping[str, Any], names: Collection[str]) -> TensorSet:
    """The tensors of a file that belong to a trunk with these names.

    Searches dicts at any depth and any prefix of the names, and takes the set with most of the trunk's names. Of equal
    sets an average is preferred to a teacher, a teacher to a student, a student to others. Raises ValueError where no
    named tensors are found.
    """
    sets = [
        tensor_set for path, tensors in _named_tensors(content) for tensor_set in _tensor_sets(path, tensors, names)
    ]
    if not sets:
        raise ValueError("expected named tensors, found none")
    most = max(tensor_set.n_matching for tensor_set in sets)
    fitting = [tensor_set for tensor_set in sets if tensor_set.n_matching == most]
    return min(fitting, key=lambda tensor_set: tensor_set.preference)


def _named_tensors(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path and tensors of every dict, nested at any depth, that holds tensors."""
    if NO_TRUNK.search(path):
        return
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _named_tensors(value, f"{path}.{name}" if path else str(name))


def _tensor_sets(path: str, tensors: dict[str, Tensor], names: Collection[str]) -> Iterator[TensorSet]:
    """A dict's tensors without their prefix, for each prefix under which most of the trunk's names are found."""
    ends = ([m.end() for m in re.finditer(r"^|\.", name)] for name in tensors)
    pairs = zip(tensors, ends, strict=True)
    counts = Counter(name[:end] for name, places in pairs for end in places if name[end:] in names)
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most]
    if most < LEAST_MATCHING * len(names):  # another layout, which timm may know
        prefixes = [_shared_wrappers(tensors)]
    prefixes += [name.removesuffix(ANCHOR) for name in tensors if name.endswith(ANCHOR)]
    for prefix in prefixes:
        if not NO_TRUNK.search(prefix):
            inside = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            inside = from_transformers(inside) if ANCHOR in inside else inside
            beside = tuple(name for name in tensors if not name.startswith(prefix))
            yield TensorSet(path, prefix, inside, beside, sum(name in inside for name in names))


def _shared_wrappers(names: Iterable[str]) -> str:
    """The chain of WRAPPERS that all names begin with."""
    rest, prefix = [name.split(".") for name in names], ""
    while rest[0][0] in WRAPPERS and all(len(parts) > 1 and parts[0] == rest[0][0] for parts in rest):
        prefix += f"{rest[0][0]}."
        rest = [parts[1:] for parts in rest]
    return prefix


def from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the library transformers, in its layout, under timm's names."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in TRANSFORMERS:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(name.replace("query", part), torch.empty(0)) for part in ("query", "key", "value")]
        if len({part.shape for part in parts}) == 1:
            renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def select(chosen: TensorSet, shapes: Shapes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors for a trunk of these names and shapes, and the skipped names of the file: heads, and those beside the
    trunk. Other names that the trunk does not have are kept: timm converts or refuses them."""
    kept = {name: tensor for name, tensor in chosen.tensors.items() if name in shapes or not HEADS.match(name)}
    skipped = [chosen.prefix + name for name in chosen.tensors if name not in kept]
    if "mask_token" in chosen.tensors and ("register_tokens" in kept or any(".mlp.w12." in name for name in kept)):
        kept["mask_token"] = chosen.tensors["mask_token"]  # by which timm knows DINOv2's own layout
    return kept, (*skipped, *chosen.beside)


def resized(kept: dict[str, Tensor], shapes: Shapes) -> tuple[str, ...]:
    """Names, old and new shape of resampled tensors. Raises ValueError for others than position embeddings."""
    changed = [name for name, tensor in kept.items() if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape))]
    for name in changed:  # timm would resample patch embeddings too: that is another model
        if "pos" not in name and kept[name].numel() != torch.Size(shapes[name]).numel():
            raise ValueError(f"1 tensor of another shape ({name} {list(kept[name].shape)}, not {list(shapes[name])})")
    by = ("x".join(map(str, shape)) for name in changed for shape in (kept[name].shape, shapes[name]))
    return tuple(f"{name} {old} -> {new}" for name, old, new in zip(changed, by, by, strict=True))


# ---- errors in one line


def misfit(error: Exception) -> str:
    """The error of torch's strict loading in one line."""
    text = " ".join(str(error).split())
    parts = []
    for title, what in (("Missing", "missing"), ("Unexpected", "unknown")):
        listed = re.search(rf'{title} key\(s\) in state_dict: ((?:"[^"]+"(?:, )?)+)', text)
        names = re.findall(r'"([^"]+)"', listed[1]) if listed else []
        parts += [f"{len(names)} {what}{in_brackets(names, 3)}"] if names else []
    sizes = re.findall(r"size mismatch for (\S+): copying a param with shape [\w.]+\(([^)]*)\).*?\(([^)]*)\)", text)
    sizes = [f"{name} {old}, not {new}" for name, old, new in sizes]
    parts += [f"{len(sizes)} of another shape{in_brackets(sizes, 2)}"] if sizes else []
    return ", ".join(parts) or words.cut(text)


@contextmanager
def asking_the_hub(name: str) -> Iterator[None]:
    """Say what is downloaded; the hub's own lines about each attempt are left out, its error says the last one."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    print(f"image weights: asking the hub for {name}", flush=True)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_failure(error: Exception, name: str, hub: str) -> ValueError:
    """Why the hub gave nothing, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    file = "give it as --image_weights FILE"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return ValueError(
            f"--image_encoder {name}: expected a model that may be downloaded, found one that is gated or does not "
            f"exist; accept its licence at https://huggingface.co/{hub}, then `hf auth login` (or set HF_TOKEN), or "
            f"download its file and {file}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ValueError(
            f"--image_encoder {name}: expected a model at https://huggingface.co/{hub}, found none; correct it"
        )
    return ValueError(
        f"--image_weights timm: expected the hub's weights of {name}, found no way to download them "
        f"({words.cut(error)}); give a .pth or .safetensors file, or none"
    )

"""Small ViTs with the class and register tokens of large ones, under names of the hub, and files of their weights."""

import timm
import torch
from timm.layers import SwiGLUPacked

from model.image_weights import Published
from utils.features import cache

WIDTH = 6
ONES = torch.ones(3)
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
SMALL = {  # small models with the class and register tokens of large ones: name, what stands before the grid
    "class": Published("test_vit"),
    "class and registers": Published("test_vit", {"reg_tokens": 4}, swiglu=True),  # as Virchow2
    "registers apart": Published("test_vit", {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}),
    "none": Published("test_vit", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
}
PREFIX_OF_POSITIONS = {"class": 1, "class and registers": 5, "registers apart": 0, "none": 0}


def build(kind, side=160, **more):
    """Of SMALL by timm alone, without a classifier, no value left at its start."""
    published = SMALL[kind]
    mlp = SWIGLU if published.swiglu else {}
    return randomise(
        timm.create_model("test_vit", num_classes=0, img_size=side, **published.arguments | mlp | more)
    ).eval()


def randomise(model):
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(std=0.1).abs_() if tensor.ndim == 1 else tensor.normal_(std=0.1)
    return model


def tiles_of(side, n=1):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_answer(encoder, reference, side):
    """Pooled features and tokens of an encoder are those of timm's model on the tiles as that wants them."""
    encoder, reference = encoder.eval(), reference.eval()
    raw = reference.forward_features((tiles_of(side) - encoder.mean) / encoder.std)
    pooled, tokens = encoder.features(tiles_of(side))
    torch.testing.assert_close(tokens, raw)
    torch.testing.assert_close(pooled, reference.forward_head(raw, pre_logits=True))


def read(path):
    return cache.read_image_weights(str(path), "--image_weights")


def written(path, state):
    torch.save(state, path)
    return read(path)

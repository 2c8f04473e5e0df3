"""scBERT written out plainly from its paper and the layout of its files, and a file of that layout with drawn tensors.

Letters: B spots, G genes, W width, H heads, E width of a head, M features.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch

from model.gene_encoder import GeneEncoder

GENES, DEPTH, WIDTH, HEADS = 12, 6, 200, 10
VOCABULARY = 16906
NAMES = [f"g{i}" for i in range(VOCABULARY)]
CHOSEN = [i * 1000 + 7 for i in range(GENES)]
PANEL = [NAMES[i] for i in CHOSEN]


def released_tensors():
    """The 91 tensors of panglao_pretrain.pth, by their names, shapes and types; values drawn."""
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0, around=0.0):
        return torch.from_numpy(around + scale * rng.standard_normal(shape)).float()

    tensors = {
        "token_emb.weight": draw(7, WIDTH),
        "pos_emb.emb.weight": torch.from_numpy(rng.standard_normal((VOCABULARY + 1, WIDTH))),
        "performer.calls_since_last_redraw": torch.tensor(0),
        "norm.weight": draw(WIDTH, around=1, scale=0.2),
        "norm.bias": draw(WIDTH, scale=0.2),
        "to_out.weight": draw(7, WIDTH),
        "to_out.bias": draw(7),
    }
    tensors["pos_emb.emb.weight"][-1] = 0
    for i in range(DEPTH):
        attention, mlp = f"performer.net.layers.{i}.0.", f"performer.net.layers.{i}.1."
        key = draw(640, WIDTH, scale=WIDTH**-0.5) * torch.linspace(0.3, 1.5, HEADS).repeat_interleave(64)[:, None]
        tensors |= {f"{part}norm.weight": draw(WIDTH, around=1, scale=0.2) for part in (attention, mlp)}
        tensors |= {f"{part}norm.bias": draw(WIDTH, scale=0.2) for part in (attention, mlp)}
        tensors |= {
            f"{attention}fn.fast_attention.projection_matrix": draw(266, 64),
            f"{attention}fn.to_q.weight": draw(640, WIDTH, scale=WIDTH**-0.5),
            f"{attention}fn.to_k.weight": key,
            f"{attention}fn.to_v.weight": draw(640, WIDTH, scale=WIDTH**-0.5),
            f"{attention}fn.to_out.weight": draw(WIDTH, 640, scale=640**-0.5),
            f"{attention}fn.to_out.bias": draw(WIDTH, scale=0.2),
            f"{mlp}fn.fn.w1.weight": draw(800, WIDTH, scale=WIDTH**-0.5),
            f"{mlp}fn.fn.w1.bias": draw(800, scale=0.2),
            f"{mlp}fn.fn.w2.weight": draw(WIDTH, 800, scale=800**-0.5),
            f"{mlp}fn.fn.w2.bias": draw(WIDTH, scale=0.2),
        }
    return tensors


def write_released(path, tensors, prefix=""):
    """A checkpoint of the released layout: beside the weights, what an optimiser and a schedule keep."""
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(7, WIDTH), "exp_avg_sq": torch.zeros(7, WIDTH)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}]
    rest = {
        "epoch": 17,
        "optimizer_state_dict": {"state": {0: moments}, "param_groups": groups},
        "scheduler_state_dict": {"first_cycle_steps": 15, "base_lrs": [1e-6], "last_epoch": 17},
        "losses": 0.5,
    }
    torch.save({"model_state_dict": named} | rest, path)
    return path


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def kernel(x, projection, largest):
    """x (B, H, G, E) / E^1/4 -> features (B, H, G, M); `largest` of the exponents' first term is taken out of them."""
    x = x / x.shape[-1] ** 0.25
    dash, half = x @ projection.T, x.square().sum(-1, keepdim=True) / 2
    return projection.shape[0] ** -0.5 * ((dash - half - largest(dash)).exp() + 1e-4)


def plain_attention(x, t, batch_wide):
    """FAVOR+ of spots, x (B, G, W), with the tensors of one attention layer -> what is added to x.

    The stabiliser of the keys is the maximum over each spot, or, as in the original, over the whole batch.
    """
    q, k, v = ((x @ t[f"fn.to_{p}.weight"].T).unflatten(-1, (-1, 64)).transpose(1, 2) for p in "qkv")  # (B, H, G, 64)
    w = t["fn.fast_attention.projection_matrix"]
    phi_q = kernel(q, w, lambda dash: dash.amax(-1, keepdim=True))
    phi_k = kernel(k, w, lambda dash: dash.max() if batch_wide else dash.amax((1, 2, 3), keepdim=True))
    mixed = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])
    return mixed.transpose(1, 2).flatten(2) @ t["fn.to_out.weight"].T + t["fn.to_out.bias"]


def plain_scbert(tensors, bins, positions, depth=DEPTH, batch_wide=False):
    """scBERT's trunk in double precision: bins (B, G), positions (G, W) -> (B, G, W)."""

    def under(prefix):
        return {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}

    x = tensors["token_emb.weight"].double()[bins.long()] + positions.double()
    for i in range(depth):
        t = under(f"performer.net.layers.{i}.0.")
        x = x + plain_attention(layer_norm(x, t["norm.weight"], t["norm.bias"]), t, batch_wide)
        t = under(f"performer.net.layers.{i}.1.")
        hidden = layer_norm(x, t["norm.weight"], t["norm.bias"]) @ t["fn.fn.w1.weight"].T + t["fn.fn.w1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + hidden @ t["fn.fn.w2.weight"].T + t["fn.fn.w2.bias"]
    t = under("norm.")
    return layer_norm(x, t["weight"], t["bias"])


def write_vocabulary(path):
    path.write_text("gene\tnumber\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(NAMES)))
    return path


def flags(folder=None, **changed):
    """Those of gene_weights.py, with the two files in a folder if given."""
    same = {"gene_weights": None, "gene2vec": None, "gene_vocab": None, "gene_aliases": None, "tune_block": 4}
    if folder is not None:
        same |= {"gene_weights": folder / "panglao_pretrain.pth", "gene_vocab": folder / "genes.tsv"}
    return SimpleNamespace(**same | {"gene_depth": DEPTH} | changed)


def gene_encoder(depth=DEPTH, n_genes=GENES, width=WIDTH, heads=HEADS):
    torch.manual_seed(0)
    return GeneEncoder(n_genes, depth, width, heads, n_tokens=4, width=16)

"""load_scbert against scBERT's forward pass written out plainly, on a file laid out as the released one."""

import math

import numpy as np
import pytest
import torch

from model.gene_encoder import GeneEncoder, load_scbert, set_gene_positions
from utils.training import checkpoint

GENES, DEPTH, WIDTH, HEADS = 12, 6, 200, 10
VOCABULARY = 16906
NO_PLACE = ["performer.calls_since_last_redraw", "pos_emb.emb.weight", "to_out.bias", "to_out.weight"]


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


def written_and_read(tensors, path, prefix=""):
    """Through a checkpoint file of the released layout."""
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    rest = {"epoch": 3, "optimizer_state_dict": {"state": {}}, "scheduler_state_dict": {}, "losses": 0.5}
    torch.save({"model_state_dict": named} | rest, path)
    return checkpoint.read_weights(path, "--gene_weights")


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def plain_attention(x, t):
    """FAVOR+ of one spot, x (G, W), with the tensors of one attention layer -> what is added to x.

    The key stabiliser, in the original the maximum over the whole batch, is this one spot's.
    """
    q, k, v = ((x @ t[f"fn.to_{p}.weight"].T).unflatten(1, (HEADS, 64)).transpose(0, 1) for p in "qkv")  # (H, G, 64)
    w, ratio = t["fn.fast_attention.projection_matrix"], 266**-0.5
    q, k = q / 64**0.25, k / 64**0.25
    to_q, to_k = q @ w.T, k @ w.T
    half_q, half_k = (y.square().sum(-1, keepdim=True) / 2 for y in (q, k))
    phi_q = ratio * ((to_q - half_q - to_q.amax(-1, keepdim=True)).exp() + 1e-4)
    phi_k = ratio * ((to_k - half_k - to_k.max()).exp() + 1e-4)
    kernel = phi_q @ phi_k.mT
    mixed = kernel / kernel.sum(-1, keepdim=True) @ v
    return torch.cat(list(mixed), dim=-1) @ t["fn.to_out.weight"].T + t["fn.to_out.bias"]


def plain_scbert(tensors, bins, positions):
    """scBERT's trunk for one spot, in double precision: bins (G,), positions (G, W) -> (G, W)."""

    def under(prefix):
        return {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}

    x = tensors["token_emb.weight"].double()[bins] + positions.double()
    for i in range(DEPTH):
        t = under(f"performer.net.layers.{i}.0.")
        x = x + plain_attention(layer_norm(x, t["norm.weight"], t["norm.bias"]), t)
        t = under(f"performer.net.layers.{i}.1.")
        hidden = layer_norm(x, t["norm.weight"], t["norm.bias"]) @ t["fn.fn.w1.weight"].T + t["fn.fn.w1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + hidden @ t["fn.fn.w2.weight"].T + t["fn.fn.w2.bias"]
    t = under("norm.")
    return layer_norm(x, t["weight"], t["bias"])


@torch.no_grad()
def trunk_output(encoder, bins):
    """What the encoder's head is given: (B, G, W)."""
    seen = []
    handle = encoder.gather.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    encoder.encode(bins)
    handle.remove()
    return seen[0]


def gene_encoder(depth=DEPTH):
    torch.manual_seed(0)
    return GeneEncoder(GENES, depth, WIDTH, HEADS, n_tokens=4, width=16)


def some_bins():
    return torch.randint(0, 7, (3, GENES), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_the_made_up_file_has_the_released_layout():
    tensors = released_tensors()
    assert len(tensors) == 91
    assert tensors["pos_emb.emb.weight"].dtype == torch.float64


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_loads_and_gives_scberts_output(tmp_path, prefix):
    tensors, encoder = released_tensors(), gene_encoder()
    read = written_and_read(tensors, tmp_path / "panglao_pretrain.pth", prefix)
    assert load_scbert(encoder, read) == NO_PLACE
    vocabulary, panel = {f"g{i}": i for i in range(VOCABULARY)}, [f"g{i * 1000 + 7}" for i in range(GENES)]
    assert set_gene_positions(encoder, read["pos_emb.emb.weight"], vocabulary, panel) == GENES
    positions = tensors["pos_emb.emb.weight"][[i * 1000 + 7 for i in range(GENES)]]
    found = trunk_output(encoder, some_bins())
    for one, bins in zip(found, some_bins(), strict=True):
        expected = plain_scbert(tensors, bins.long(), positions)
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)


def test_prefixed_names_are_taken_as_they_stand_too():
    tensors, encoder = released_tensors(), gene_encoder()
    assert load_scbert(encoder, {f"module.{name}": tensor for name, tensor in tensors.items()}) == NO_PLACE
    assert torch.equal(encoder.token_embedding.weight, tensors["token_emb.weight"])


def test_every_trunk_tensor_is_overwritten():
    encoder = gene_encoder()
    for tensor in encoder.state_dict().values():
        tensor.fill_(torch.nan)
    load_scbert(encoder, released_tensors())
    left = {name for name, tensor in encoder.state_dict().items() if tensor.isnan().any()}
    assert left == {
        name for name in encoder.state_dict() if name.startswith(("gather.", "linear_path.", "gene_embedding."))
    }


@pytest.mark.parametrize("depth", [6, 2])
def test_a_missing_tensor_is_named(depth):
    tensors = released_tensors()
    del tensors["performer.net.layers.1.0.fn.to_k.weight"]
    with pytest.raises(
        ValueError, match=rf"{depth * 14 + 2} of .* {depth * 14 + 3} .* missing .*1\.0\.fn\.to_k\.weight$"
    ):
        load_scbert(gene_encoder(depth=depth), tensors)


def test_nothing_of_scbert_in_the_file_is_refused():
    with pytest.raises(ValueError, match=r"0 of scBERT's 87 tensors found, missing .* and 86 more"):
        load_scbert(gene_encoder(), {"layer.weight": torch.zeros(3)})


def test_a_tensor_of_another_shape_is_named():
    tensors = released_tensors()
    tensors["performer.net.layers.3.1.fn.fn.w1.weight"] = torch.zeros(400, WIDTH)
    with pytest.raises(
        ValueError, match=r"layers\.3\.1\.fn\.fn\.w1\.weight has shape \(400, 200\), expected \(800, 200\)"
    ):
        load_scbert(gene_encoder(), tensors)

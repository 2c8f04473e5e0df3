"""gene_encoder.py against scBERT's forward pass written out plainly, on a file laid out as the released one."""

import math

import numpy as np
import pytest
import torch

from model.gene_encoder import GatherTokens, GeneEncoder, load_scbert, set_gene_positions
from model.momentum import make_twin
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


def gene_encoder(n_genes=GENES, depth=DEPTH):
    torch.manual_seed(0)
    return GeneEncoder(n_genes, depth, WIDTH, HEADS, n_tokens=4, width=16)


def small_encoder(depth=3):
    torch.manual_seed(0)
    return GeneEncoder(GENES, depth, gene_width=24, heads=2, n_tokens=4, width=16)


def some_bins(n=3, n_genes=GENES):
    return torch.randint(0, 7, (n, n_genes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


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
    assert left == {name for name in encoder.state_dict() if name.startswith(("gather.", "gene_embedding."))}


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


def positions_for(genes, vocabulary, table):
    encoder = gene_encoder(len(genes), depth=1)
    set_gene_positions(encoder, table, vocabulary, genes)
    return encoder.gene_embedding.weight.detach()


def test_positions_are_looked_up_by_name_whatever_the_order():
    genes, table = ["B", "D", "A"], torch.randn(5, WIDTH, dtype=torch.float64)
    vocabulary = {name: i for i, name in enumerate("ABCD")}
    found = positions_for(genes, vocabulary, table)
    torch.testing.assert_close(found, table[[1, 3, 0]].float())
    order = [2, 0, 3, 1]  # the same vocabulary and table, written in another order
    permuted = {"ABCD"[old]: new for new, old in enumerate(order)}
    assert torch.equal(positions_for(genes, permuted, table[order]), found)


def test_a_gene_outside_the_vocabulary_keeps_its_start():
    encoder = gene_encoder(3, depth=1)
    before = encoder.gene_embedding.weight.detach().clone()
    assert set_gene_positions(encoder, torch.ones(2, WIDTH), {"A": 0, "B": 1}, ["X", "B", "Y"]) == 1
    assert torch.equal(encoder.gene_embedding.weight[[0, 2]], before[[0, 2]])
    assert torch.equal(encoder.gene_embedding.weight[1], torch.ones(WIDTH))


@pytest.mark.parametrize(
    ("table", "vocabulary", "message"),
    [
        (torch.zeros(3, WIDTH), {}, "holds none of the 2 panel genes"),
        (torch.zeros(3, WIDTH), {"X": 0}, r"\(X, \.\.\.\) holds none of the 2 panel genes \(A, \.\.\.\)"),
        (torch.zeros(3, 100), {"A": 0}, r"rows of 200 numbers .* found shape \(3, 100\)"),
        (torch.zeros(WIDTH), {"A": 0}, r"found shape \(200,\)"),
        (torch.zeros(1, WIDTH), {"A": 0, "B": 1}, "1 rows, --gene_vocab has 2 genes"),
    ],
    ids=["empty vocabulary", "other genes", "other width", "no table", "longer vocabulary"],
)
def test_positions_that_do_not_fit_are_refused(table, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        set_gene_positions(gene_encoder(2, depth=1), table, vocabulary, ["A", "B"])


def test_frozen_trunk_leaves_one_block_norm_and_head_to_train():
    encoder = small_encoder()
    encoder.freeze_trunk(1)
    trained = {name.split(".")[0] + name.split(".")[1] * name.startswith("blocks") for name in trained_names(encoder)}
    assert trained == {"blocks1", "norm", "gather"}
    one = {name for name in trained_names(encoder) if name.startswith("blocks.")}
    assert one == {f"blocks.1.{name}" for name, _ in encoder.blocks[1].named_parameters()}


def trained_names(encoder):
    return {name for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuned", [0, 1, 2])
@torch.no_grad()
def test_freezing_does_not_change_the_output_of_encoder_or_twin(tuned):
    encoder = small_encoder()
    expected = encoder.encode(some_bins())
    torch.testing.assert_close(encoder(some_bins()), expected)
    encoder.freeze_trunk(tuned)
    start = encoder.frozen_part(some_bins())
    assert start.shape == ((3, GENES) if tuned == 0 else (3, GENES, 24))
    for one in (encoder, make_twin(encoder)):
        torch.testing.assert_close(one(start), expected)
        torch.testing.assert_close(one.encode(some_bins()), expected)


@pytest.mark.parametrize("tuned", [-1, 3])
def test_a_block_that_is_not_there_cannot_be_tuned(tuned):
    with pytest.raises(ValueError, match=rf"--tune_block {tuned}: expected 0\.\.2"):
        small_encoder().freeze_trunk(tuned)


@torch.no_grad()
def test_output_knows_which_gene_has_which_bin():
    encoder = small_encoder()
    bins = torch.full((1, GENES), 2)
    bins[0, 0], swapped = 5, bins.clone()
    swapped[0, 0], swapped[0, 1] = 2, 5
    for found, other in zip(encoder.encode(bins), encoder.encode(swapped), strict=True):
        assert (found - other).abs().max() > 1e-3


@torch.no_grad()
def test_every_bin_and_every_gene_counts():
    encoder, bins = small_encoder(), torch.zeros(1, GENES, dtype=torch.uint8)
    base = encoder.encode(bins)[0]
    seen = [base]
    for value in range(1, 7):
        seen.append(encoder.encode(bins + value)[0])
    for gene in range(GENES):
        changed = bins.clone()
        changed[0, gene] = 3
        seen.append(encoder.encode(changed)[0])
    between = torch.cdist(torch.cat(seen), torch.cat(seen)) + torch.eye(len(seen))
    assert between.min() > 1e-3


@torch.no_grad()
def test_gathered_tokens_see_all_genes_in_any_order():
    torch.manual_seed(0)
    gather, genes = GatherTokens(6, 16, n_tokens=3, heads=4), torch.randn(2, 5, 6)
    tokens, vector = gather(genes)
    assert tokens.shape == (2, 3, 16)
    assert vector.shape == (2, 16)
    again, again_vector = gather(genes[:, torch.randperm(5)])
    torch.testing.assert_close(again, tokens)
    torch.testing.assert_close(again_vector, vector)
    assert (tokens[:, :, None] - tokens[:, None]).abs().amax(-1)[:, ~torch.eye(3, dtype=torch.bool)].min() > 1e-2
    for i in range(5):
        changed = genes.clone()
        changed[:, i] += 1 + torch.randn(6)
        other, other_vector = gather(changed)
        assert ((other - tokens).abs().amax(-1) > 1e-4).all()
        assert ((other_vector - vector).abs().amax(-1) > 1e-4).all()


def test_gathering_queries_and_keys_learn():
    gather = GatherTokens(6, 16, n_tokens=3, heads=4)
    tokens, vector = gather(torch.randn(2, 5, 6))
    (tokens * torch.randn_like(tokens)).sum().backward(retain_graph=True)
    vector.square().sum().backward()
    for gradient in (gather.attend.to_q.weight.grad, gather.attend.to_kv.weight.grad[:16], gather.queries.grad):
        assert gradient.abs().max() > 1e-4

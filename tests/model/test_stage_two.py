"""stage_two.py: features of the frozen encoder, the scale of predictions, and how far from the train tiles one is."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from model import losses
from model.stage_two import GRID_SIDE, StageTwo, StageTwoSizes

WIDTH, GENES, CONTEXT = 16, 7, 4
VECTORS = 4  # rows of WIDTH that test_vit's 64 pooled features fill


def stage_two(image_encoder="test_vit", image_size=96, **sizes):
    torch.manual_seed(0)
    small = {"width": WIDTH, "decoder_layers": 1, "decoder_width": 16, "context": CONTEXT}
    return StageTwo(StageTwoSizes(GENES, image_encoder, image_size, **small | sizes))


def batch_of(n=5):
    torch.manual_seed(1)
    return {
        "vector": torch.randn(n, VECTORS * WIDTH),
        "tokens": torch.randn(n, GRID_SIDE**2, WIDTH),
        "context": torch.randn(n, CONTEXT, VECTORS * WIDTH),
        "offsets": torch.randn(n, CONTEXT, 2),
        "present": torch.rand(n, CONTEXT) > 0.3,
        "smoothed": torch.randn(n, 3, VECTORS * WIDTH),
    }


def test_features_of_a_vit_are_the_pooled_ones_and_four_by_four_tokens():
    model, tiles = stage_two(), torch.rand(3, 3, 96, 96)
    found = model.encode(tiles)
    assert found.shape == (3, VECTORS + 16, WIDTH) and model.n_vectors == VECTORS
    pooled, raw = model.image_encoder.features(tiles)
    torch.testing.assert_close(found[:, :VECTORS].flatten(1), pooled)
    assert raw.shape[1] == 1 + 36
    corner = raw[:, 1:].unflatten(1, (6, 6))[:, :2, :2].mean((1, 2))  # adaptive pooling of 6 x 6 to 4 x 4
    torch.testing.assert_close(found[:, VECTORS], model.image_encoder.to_token(corner))


def test_a_row_that_is_not_full_ends_in_zeros():
    model, tiles = stage_two(width=48), torch.rand(3, 3, 96, 96)
    vectors = model.encode(tiles)[:, : model.n_vectors].flatten(1)
    assert vectors.shape == (3, 96) and not vectors[:, 64:].any()
    torch.testing.assert_close(vectors[:, :64], model.image_encoder.features(tiles)[0])


def test_a_smaller_feature_map_gives_fewer_tokens():
    model = stage_two("resnet18", 64)
    assert model.encode(torch.rand(3, 3, 64, 64)).shape == (3, 512 // WIDTH + 4, WIDTH)


# a grid mirrored at its diagonal or not, then its rows backwards or not, then its columns: all turns and flips of it
TURNS = list(itertools.product((False, True), repeat=3))
TURNS_OF = {1: TURNS[:1], 2: [TURNS[0], TURNS[3]], 4: [TURNS[i] for i in (0, 3, 5, 6)], 8: TURNS}


def turned(grid, turn):
    """(..., P, P) -> the same, turned."""
    mirrored, rows, columns = turn
    grid = grid.mT if mirrored else grid
    return grid.flip([axis for axis, back in ((-2, rows), (-1, columns)) if back])


def as_grid(tokens):
    """(B, 16, D) -> (B, D, 4, 4)"""
    return tokens.mT.unflatten(2, (4, 4))


class GridEncoder(torch.nn.Module):
    """Tokens are the means of a 4 x 4 grid of the tile; the pooled features weigh pixels by their place."""

    def features(self, tiles):
        place = torch.arange(tiles.shape[-1] ** 2).view(tiles.shape[-2:]) / tiles.shape[-1] ** 2
        return (tiles * place).sum((2, 3)), F.adaptive_avg_pool2d(tiles, 4).flatten(2).mT

    def grid_tokens(self, tokens, side):
        return tokens


@pytest.mark.parametrize("tta", TURNS_OF)
def test_tokens_of_turned_tiles_are_put_back_in_their_place(tta):
    model, tiles = stage_two(tta=tta, width=3), torch.rand(3, 3, 16, 16)
    model.image_encoder = GridEncoder()
    pooled, tokens = model.image_encoder.features(tiles)
    found = model.encode(tiles)
    torch.testing.assert_close(found[:, model.n_vectors :], tokens)
    seen = [model.image_encoder.features(turned(tiles, turn))[0] for turn in TURNS_OF[tta]]
    torch.testing.assert_close(found[:, 0], torch.stack(seen).mean(0))
    assert torch.allclose(found[:, 0], pooled) == (tta == 1)


@pytest.mark.parametrize("tta", TURNS_OF)
def test_features_of_a_turned_tile_are_those_of_the_tile_turned(tta):
    """For every turn that is among those averaged over, and for no other."""
    model, tiles = stage_two(tta=tta), torch.rand(2, 3, 96, 96)
    plain = model.encode(tiles)
    for turn in TURNS:
        found = model.encode(turned(tiles, turn))
        same = torch.allclose(found[:, :VECTORS], plain[:, :VECTORS], atol=1e-5)
        assert same == (turn in TURNS_OF[tta]), turn
        if same:
            there, before = as_grid(found[:, VECTORS:]), as_grid(plain[:, VECTORS:])
            torch.testing.assert_close(there, turned(before, turn), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("image_encoder", ["test_vit", "resnet18"])
def test_the_encoder_is_frozen_in_training_mode_too(image_encoder):
    model, tiles = stage_two(image_encoder).train(), torch.rand(3, 3, 96, 96)
    before = {name: tensor.clone() for name, tensor in model.image_encoder.state_dict().items()}
    first = model.encode(tiles)
    assert not first.requires_grad
    assert not any(p.requires_grad for p in model.image_encoder.parameters())
    assert not any(m.training for m in model.image_encoder.modules())
    assert model.decoder.training
    assert torch.equal(model.encode(tiles), first)
    assert all(torch.equal(t, before[name]) for name, t in model.image_encoder.state_dict().items())
    frozen = {name for name, p in model.decoder.named_parameters() if not p.requires_grad}
    assert frozen == {"ridge.linear.weight", "ridge.linear.bias"}, "solved, not trained"


@torch.no_grad()
def test_predictions_are_in_the_units_of_the_target():
    model, batch = stage_two().eval(), batch_of()
    torch.testing.assert_close(model.predict(batch), model.decoder(**batch))
    mean, sd = torch.arange(GENES) * 10.0, torch.arange(GENES) + 0.5
    model.set_target_scale(mean, sd)
    torch.testing.assert_close(model.predict(batch), model.decoder(**batch) * sd + mean)
    other = stage_two().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(batch), model.predict(batch))


def test_the_decoder_learns_one_batch():
    model, batch = stage_two().train(), batch_of(16)
    target = torch.randn(16, GENES)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=3e-3)
    seen = []
    for _ in range(40):
        loss = losses.expression_loss(model.decoder(**batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[0] > 0.8
    assert seen[-1] < 0.2


@pytest.mark.slow
def test_one_step_at_the_published_size():
    torch.manual_seed(0)
    model = StageTwo(StageTwoSizes(n_genes=300, image_encoder="deit_base_patch16_224.fb_in1k", image_size=224)).train()
    features = model.encode(torch.rand(2, 3, 224, 224))
    assert features.shape == (2, 2 + 16, 512)
    context = {"context": torch.randn(2, 18, 1024), "offsets": torch.randn(2, 18, 2), "present": torch.ones(2, 18) > 0}
    batch = model.split(features) | context | {"smoothed": torch.randn(2, 3, 1024)}
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-4)
    loss = losses.expression_loss(model.decoder(**batch), torch.randn(2, 300))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert len(model.decoder.blocks) == 6
    assert all(torch.isfinite(p).all() for p in model.decoder.parameters())
